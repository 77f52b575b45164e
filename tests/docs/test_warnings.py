import re

from conftest import ROOT


def test_the_page_for_radiologists_explains_warnings_that_exist():
    table = (ROOT / "docs" / "reading-a-draft.md").read_text(encoding="utf-8").partition("| text | meaning")[2]
    quoted = re.findall(r"\*([^*|]+)\*", table.partition("\n\n")[0])
    code = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "cbedge").rglob("*.py"))
    code = re.sub(r'"\s+f?"', "", code)  # joins the lines of a message
    pieces = [piece.strip() for text in quoted for piece in text.split("…") if piece.strip()]
    assert len(pieces) > 10 and [piece for piece in pieces if piece not in code] == []
