/** What Ferrotype throws on purpose; the message is one line that says what is wrong and what to do. */
export class FerrotypeError extends Error {
  override name = "FerrotypeError";
}

/** The bundle is damaged, incomplete, of another format or of another target. */
export class BundleError extends FerrotypeError {
  override name = "BundleError";
}

/** An argument that no run takes: a size, a seed, a number of steps. */
export class OptionError extends FerrotypeError {
  override name = "OptionError";
}

/** What was asked for is not what the model was distilled for; `force` insists. */
export class RecipeRefusal extends OptionError {
  override name = "RecipeRefusal";
}

/** A network returned something that is no picture. */
export class PipelineError extends FerrotypeError {
  override name = "PipelineError";
}

/** `text` as one short line that moves no cursor: bundles are others' words. */
export function printable(text: string, limit = 300): string {
  const line = text.replace(
    /[\p{C}\p{Zl}\p{Zp}]/gu,
    (c) => `\\u{${c.codePointAt(0)!.toString(16)}}`,
  );
  return line.length <= limit ? line : `${line.slice(0, limit - 1)}…`;
}
