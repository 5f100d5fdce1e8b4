"""The browser of the tests sees what is wrong with a page."""

PAGE = "<!doctype html><meta charset=utf-8><title>t</title><link rel=icon href=data:,>"


def test_a_page_is_opened_at_a_width_and_in_the_dark(browse, tmp_path):
    path = tmp_path / "page.html"
    path.write_text(PAGE + "<p>hello")
    page = browse(path, width=390, dark=True)
    assert page.tab.inner_text("p") == "hello"
    assert page.tab.evaluate("innerWidth") == 390
    assert page.tab.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")
    assert page.errors == []
    assert page.requests == [path.as_uri()]
    assert page.picture(tmp_path / "page.png").read_bytes().startswith(b"\x89PNG")


def test_errors_of_all_kinds_are_noted(browse, tmp_path):
    path = tmp_path / "page.html"
    path.write_text(
        PAGE + "<img src=missing.png><script>console.error('said'); throw Error('thrown')</script>"
    )
    page = browse(path)
    told = "\n".join(page.errors)
    assert "said" in told
    assert "thrown" in told
    assert "missing.png" in told
