"""Codes of structures: as DICOM lists them, from a file, with their side; unknown ones are told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydicom.sr._concepts_dict import concepts as listed

from recallseg.engines.errors import InputError
from recallseg.runtime.formats import concepts
from recallseg.runtime.formats.concepts import Code, concepts_for, read_concepts


def test_the_table_has_the_codes_that_dicom_lists() -> None:
    by_value: dict[str, set[str]] = {}
    for entries in listed["SCT"].values():
        for value, (meaning, _) in entries.items():
            by_value.setdefault(value, set()).add(meaning.casefold())
    for names, value, meaning, category, colour in concepts._TABLE:
        stated = {text.split(" structure (body")[0] for text in by_value[value]}
        assert meaning.casefold() in stated, names
        assert category.value in by_value
        assert all(0 <= c <= 255 for c in colour)
    for side in concepts.SIDES.values():
        assert side.meaning.casefold() in by_value[side.value]
    names = [name for row in concepts._TABLE for name in row[0].split(", ")]
    assert len(names) == len(set(names))
    assert names == [name.casefold() for name in names]


@pytest.mark.parametrize(
    ("name", "code", "side"),
    [
        ("liver", "10200004", None),
        ("Liver", "10200004", None),
        ("left kidney", "64033007", "Left"),
        ("Kidney_Right", "64033007", "Right"),
        ("left ventricle", "87878005", None),  # its own entry, not a ventricle on the left
        ("tumour", "108369006", None),
        ("grey-matter", "389081007", None),
    ],
)
def test_names_find_their_codes(name: str, code: str, side: str | None) -> None:
    concept = concepts_for([name])[name]
    assert (concept.type.value, concept.known) == (code, True)
    assert (None if concept.modifier is None else concept.modifier.meaning) == side


def test_what_is_not_known_is_tissue_and_says_so() -> None:
    first, second = concepts_for(["blob", "thing"]).values()
    assert (first.type.meaning, first.known) == ("Tissue", False)
    assert first.colour != second.colour


@pytest.mark.parametrize("suffix", [".toml", ".json"])
def test_a_file_of_codes(tmp_path: Path, suffix: str) -> None:
    table = {
        "GTV": {
            "type": ["108369006", "SCT", "Neoplasm"],
            "category": ["49755003", "SCT", "Morphologically Abnormal Structure"],
            "region": ["39607008", "SCT", "Lung"],
            "colour": [1, 2, 3],
        }
    }
    text = json.dumps(table)
    if suffix == ".toml":
        text = "[GTV]\n" + "\n".join(f"{k} = {json.dumps(v)}" for k, v in table["GTV"].items())
    path = tmp_path / f"codes{suffix}"
    path.write_text(text)
    found = concepts_for(["gtv", "liver"], read_concepts(path))
    assert found["gtv"].type == Code("108369006", "SCT", "Neoplasm")
    assert found["gtv"].region == Code("39607008", "SCT", "Lung")
    assert found["gtv"].colour == (1, 2, 3)
    assert found["liver"].type.meaning == "Liver"
    assert "SCT^108369006^Neoplasm" in found["gtv"].terminology()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[a]\ncategory = ['1', 'SCT', 'x']", "needs a type"),
        ("[a]\ntype = ['1', 'SCT']", "must read like"),
        ("[a]\ntype = ['12345678901234567', 'SCT', 'x']", "at most 16"),
        ("[a]\ntype = ['1', 'SCT', 'x']\ncolor = [1, 2, 3]", "entry 'color'"),
        ("[a]\ntype = ['1', 'SCT', 'x']\ncolour = [1, 2, 300]", "from 0 to 255"),
        ("a = 1", "needs a type"),
        ("[a", "no table of codes"),
    ],
)
def test_a_file_that_is_no_table_of_codes(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "c.toml").write_text(text)
    with pytest.raises(InputError, match=message):
        read_concepts(tmp_path / "c.toml")
    with pytest.raises(InputError, match="cannot be read"):
        read_concepts(tmp_path / "none.toml")


def test_two_names_of_one_structure_are_refused(tmp_path: Path) -> None:
    """Which of them counted was a matter of their order."""
    text = "['Left Lung']\ntype = ['1', 'X', 'a']\n[left_lung]\ntype = ['2', 'X', 'b']\n"
    (tmp_path / "codes.toml").write_text(text)
    with pytest.raises(InputError, match="'Left Lung' and of 'left_lung', which are one name"):
        read_concepts(tmp_path / "codes.toml")
