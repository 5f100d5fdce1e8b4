"""What draws: tokenizer, schedules, samplers, seeds, engines and the pipeline.  Never torch."""
