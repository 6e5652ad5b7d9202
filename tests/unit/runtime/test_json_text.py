"""Text of strangers, made fit to be shown."""

from __future__ import annotations

import json
import unicodedata

import pytest

from recallseg.runtime.json_text import json_text, printable

HOSTILE = (
    "\x1b[2J\x1b]0;owned\x07 \r\b\x7f\x85\x9b31m \u202egnp.\u2066 \u200b\ufeff \udcff \U000e0041"
)


@pytest.mark.parametrize("text", [HOSTILE, "a\nb", "a\tb", "\x00"])
def test_nothing_reaches_a_terminal_but_what_can_be_printed(text: str) -> None:
    shown = printable(text)
    assert shown.isprintable()
    assert shown.encode().decode() == shown
    kept = printable(text, lines=True)
    assert kept.replace("\n", "").isprintable()
    assert kept.count("\n") == text.count("\n")


def test_what_can_be_printed_stays(capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("plain", "Größe 3 µm²", "心臓", "قلب", "a\u00a0b\u202fc", "❤"):
        assert printable(text) == text
        assert json_text(text) == json.dumps(text, ensure_ascii=False)


def test_json_says_the_same_and_can_be_shown() -> None:
    value = {HOSTILE: [HOSTILE, "a\nb", 1.5, None]}
    text = json_text(value)
    assert json.loads(text) == value
    assert not [c for c in text if unicodedata.category(c) in ("Cc", "Cf", "Cs") and c != "\n"]
