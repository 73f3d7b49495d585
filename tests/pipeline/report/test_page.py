import re
from pathlib import Path

from pipeline.report.page import page
from tests.support.small_world import HARM, compared


def test_what_comes_from_users_is_escaped_wherever_it_stands(outputs: Path):
    html = page(compared(outputs, "*"))
    assert HARM not in html
    assert html.count("&lt;script&gt;throw 1&lt;/script&gt;") >= 4  # a setting, a failure, captions, their pictures


def test_a_config_cannot_end_the_script_that_holds_the_data(outputs: Path):
    html = page(compared(outputs, "*"))
    scripts = re.findall(r"<script nonce=\"[^\"]+\"[^>]*>(.*?)</script>", html, re.DOTALL)
    assert len(scripts) == 3 == html.count("</script>")


def test_the_page_names_nothing_on_the_network(outputs: Path):
    html = page(compared(outputs, "*"))
    assert not re.search(
        r"""(?:src|href)\s*=\s*["']?(?!data:|#)[^"'\s>]""", re.sub(r"<script.*?</script>", "", html, flags=re.DOTALL)
    )
    assert "@import" not in html
    assert "url(" not in html
    assert "default-src 'none'" in html


def test_one_run_alone_has_no_section_of_differences(outputs: Path):
    assert 'id="differences"' not in page(compared(outputs, "again"))
    assert 'id="differences"' in page(compared(outputs, "trial"))
