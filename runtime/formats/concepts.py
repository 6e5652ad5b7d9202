"""What a structure is, in codes that other systems understand, and the colour it is drawn in.

A small table of common organs and findings has the SNOMED CT codes that DICOM PS3.16 lists; a file
(``--codes``) has what a site needs beyond that. Structures in neither are written as a tissue
without a more precise meaning, and that is said.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recallseg.engines.errors import InputError
from recallseg.engines.reading import read_text

__all__ = ["Code", "Concept", "concepts_for", "read_concepts"]


@dataclass(frozen=True)
class Code:
    """A coded concept (PS3.16): value, coding scheme, meaning."""

    value: str
    scheme: str
    meaning: str

    def __str__(self) -> str:
        return f"{self.scheme}^{self.value}^{self.meaning}"


ANATOMY = Code("91723000", "SCT", "Anatomical Structure")
TISSUE = Code("85756007", "SCT", "Tissue")
CHANGE = Code("49755003", "SCT", "Morphologically Abnormal Structure")
SUBSTANCE = Code("91720002", "SCT", "Body Substance")
SIDES = {
    "left": Code("7771000", "SCT", "Left"),
    "right": Code("24028007", "SCT", "Right"),
    "bilateral": Code("51440002", "SCT", "Bilateral"),
}
"""Modifiers of side (CID 244) by the word that they have in a structure's name."""


@dataclass(frozen=True)
class Concept:
    """What one structure is.

    Attributes
    ----------
    category, type : segmented property category (CID 7150) and type.
    modifier : of the type, e.g. a side; or None.
    region : anatomic region that it lies in, or None.
    colour : red, green, blue, 0..255.
    known : False if nothing but "tissue" can be said.
    """

    category: Code
    type: Code
    modifier: Code | None = None
    region: Code | None = None
    colour: tuple[int, int, int] = (128, 174, 128)
    known: bool = True

    def terminology(self) -> str:
        """Return it as 3D Slicer's terminology entry has it."""
        nothing = "^^"
        parts = (
            "Segmentation category and type - DICOM master list",
            _entry(self.category),
            _entry(self.type),
            _entry(self.modifier) if self.modifier else nothing,
            "Anatomic codes - DICOM master list",
            _entry(self.region) if self.region else nothing,
            nothing,
        )
        return "~".join(parts)


# fmt: off
_TABLE: tuple[tuple[str, str, str, Code, tuple[int, int, int]], ...] = (
    ("adrenal gland", "23451007", "Adrenal gland", ANATOMY, (249, 186, 150)),
    ("amygdala", "4958002", "Amygdala", ANATOMY, (88, 141, 198)),
    ("aorta", "15825003", "Aorta", ANATOMY, (224, 97, 76)),
    ("bladder, urinary bladder", "89837001", "Bladder", ANATOMY, (222, 154, 132)),
    ("bone", "272673000", "Bone", ANATOMY, (241, 214, 145)),
    ("brain", "12738006", "Brain", ANATOMY, (250, 250, 225)),
    ("brain stem, brainstem", "119238007", "Brain Stem", ANATOMY, (183, 166, 211)),
    ("breast", "76752008", "Breast", ANATOMY, (255, 198, 175)),
    ("bronchus", "955009", "Bronchus", ANATOMY, (175, 216, 244)),
    ("caudate, caudate nucleus", "11000004", "Caudate Nucleus", ANATOMY, (217, 198, 131)),
    ("cerebellum", "113305005", "Cerebellum", ANATOMY, (194, 195, 164)),
    ("clavicle", "51299004", "Clavicle", ANATOMY, (226, 202, 134)),
    ("colon", "71854001", "Colon", ANATOMY, (204, 168, 143)),
    ("corpus callosum", "88442005", "Corpus callosum", ANATOMY, (185, 135, 134)),
    ("duodenum", "38848004", "Duodenum", ANATOMY, (255, 253, 229)),
    ("esophagus, oesophagus", "32849002", "Esophagus", ANATOMY, (211, 171, 143)),
    ("eye", "81745001", "Eye", ANATOMY, (194, 142, 0)),
    ("femoral head", "2812003", "Femoral head", ANATOMY, (232, 206, 140)),
    ("femur", "71341001", "Femur", ANATOMY, (255, 238, 170)),
    ("gallbladder", "28231008", "Gallbladder", ANATOMY, (139, 150, 98)),
    ("globus pallidus, pallidum", "14738005", "Globus Pallidus", ANATOMY, (216, 132, 105)),
    ("heart", "80891009", "Heart", ANATOMY, (206, 110, 84)),
    ("hippocampus", "5366008", "Hippocampus", ANATOMY, (221, 130, 101)),
    ("humerus", "85050009", "Humerus", ANATOMY, (235, 210, 140)),
    ("inferior vena cava", "64131007", "Inferior vena cava", ANATOMY, (0, 151, 206)),
    ("kidney", "64033007", "Kidney", ANATOMY, (185, 102, 83)),
    ("larynx", "4596009", "Larynx", ANATOMY, (150, 208, 243)),
    ("left atrium", "82471001", "Left atrium", ANATOMY, (180, 120, 110)),
    ("left ventricle", "87878005", "Left ventricle", ANATOMY, (205, 95, 80)),
    ("lens", "78076003", "Lens", ANATOMY, (171, 85, 68)),
    ("liver", "10200004", "Liver", ANATOMY, (221, 130, 101)),
    ("lung", "39607008", "Lung", ANATOMY, (197, 165, 145)),
    ("lymph node", "59441001", "Lymph Node", ANATOMY, (68, 172, 100)),
    ("mandible", "91609006", "Mandible", ANATOMY, (222, 198, 101)),
    ("muscle", "71616004", "Muscle", ANATOMY, (192, 104, 88)),
    ("myocardium", "49848007", "Left Ventricle Myocardium", ANATOMY, (192, 104, 88)),
    ("optic chiasm", "244453006", "Optic chiasm", ANATOMY, (234, 234, 164)),
    ("optic disc", "81016008", "Optic disc", ANATOMY, (255, 230, 150)),
    ("optic nerve", "18234004", "optic nerve", ANATOMY, (244, 214, 49)),
    ("ovary", "15497006", "Ovary", ANATOMY, (255, 200, 190)),
    ("pancreas", "15776009", "Pancreas", ANATOMY, (249, 180, 111)),
    ("parotid gland", "45289007", "Parotid gland", ANATOMY, (220, 190, 120)),
    ("patella", "64234005", "Patella", ANATOMY, (230, 210, 150)),
    ("pericardium", "76848001", "Pericardium", ANATOMY, (255, 244, 209)),
    ("pituitary, pituitary gland", "56329008", "Pituitary", ANATOMY, (230, 158, 140)),
    ("placenta", "78067005", "Placenta", ANATOMY, (200, 120, 130)),
    ("portal vein", "32764006", "Portal vein", ANATOMY, (0, 120, 190)),
    ("prostate", "41216001", "Prostate", ANATOMY, (230, 158, 140)),
    ("pulmonary artery", "81040000", "Pulmonary artery", ANATOMY, (0, 122, 171)),
    ("putamen", "89278009", "Putamen", ANATOMY, (100, 153, 200)),
    ("rectum", "34402009", "Rectum", ANATOMY, (188, 128, 105)),
    ("retina", "5665001", "Retina", ANATOMY, (230, 160, 90)),
    ("rib", "113197003", "Rib", ANATOMY, (253, 232, 158)),
    ("right atrium", "73829009", "Right atrium", ANATOMY, (150, 130, 170)),
    ("right ventricle", "53085002", "Right ventricle", ANATOMY, (110, 130, 190)),
    ("sacrum", "54735007", "Sacrum", ANATOMY, (212, 188, 102)),
    ("scapula", "79601000", "Scapula", ANATOMY, (212, 188, 120)),
    ("seminal vesicle", "64739004", "Seminal Vesicle", ANATOMY, (245, 172, 147)),
    ("sigmoid colon", "60184004", "Sigmoid colon", ANATOMY, (200, 160, 140)),
    ("skin", "39937001", "Skin", ANATOMY, (177, 122, 101)),
    ("skull", "89546000", "Skull", ANATOMY, (241, 213, 144)),
    ("small intestine, small bowel", "30315005", "Small intestine", ANATOMY, (205, 167, 142)),
    ("spinal cord", "2748008", "Spinal cord", ANATOMY, (244, 214, 49)),
    ("spine, vertebral column", "421060004", "Spine", ANATOMY, (226, 202, 134)),
    ("spleen", "78961009", "Spleen", ANATOMY, (157, 108, 162)),
    ("sternum", "56873002", "Sternum", ANATOMY, (244, 217, 154)),
    ("stomach", "69695003", "Stomach", ANATOMY, (216, 132, 105)),
    ("submandibular gland", "54019009", "Submandibular gland", ANATOMY, (222, 180, 110)),
    ("superior vena cava", "48345005", "Superior vena cava", ANATOMY, (0, 140, 200)),
    ("testis", "40689003", "Testis", ANATOMY, (230, 220, 180)),
    ("thalamus", "42695009", "Thalamus", ANATOMY, (162, 115, 105)),
    ("thymus", "9875009", "Thymus", ANATOMY, (47, 150, 103)),
    ("thyroid, thyroid gland", "69748006", "Thyroid", ANATOMY, (62, 162, 114)),
    ("tibia", "12611008", "Tibia", ANATOMY, (255, 238, 170)),
    ("tongue", "21974007", "Tongue", ANATOMY, (166, 84, 94)),
    ("tooth", "38199008", "Tooth", ANATOMY, (255, 250, 220)),
    ("trachea", "44567001", "Trachea", ANATOMY, (182, 228, 255)),
    ("ureter", "87953007", "Ureter", ANATOMY, (216, 190, 120)),
    ("uterus", "35039007", "Uterus", ANATOMY, (255, 181, 158)),
    ("vertebra", "51282000", "Vertebra", ANATOMY, (255, 255, 207)),
    ("lateral ventricle", "66720007", "Lateral Ventricle", ANATOMY, (88, 106, 215)),
    ("artery", "51114001", "Artery", ANATOMY, (216, 101, 79)),
    ("vein", "29092000", "Vein", ANATOMY, (0, 151, 206)),
    ("nerve", "91728009", "Nerve", ANATOMY, (244, 214, 49)),
    ("grey matter, gray matter", "389081007", "Gray Matter", TISSUE, (128, 174, 128)),
    ("white matter", "389080008", "White Matter", TISSUE, (230, 220, 200)),
    ("cartilage", "309312004", "Cartilage", TISSUE, (111, 184, 210)),
    ("fat, adipose tissue", "55603005", "Fat", TISSUE, (230, 220, 70)),
    ("cell nucleus, nucleus", "84640000", "Nucleus", TISSUE, (100, 100, 220)),
    ("cell", "4421005", "Cell", TISSUE, (120, 180, 220)),
    ("tumor, tumour, neoplasm", "108369006", "Neoplasm", CHANGE, (144, 238, 144)),
    ("lesion", "52988006", "Lesion", CHANGE, (218, 165, 32)),
    ("mass", "4147007", "Mass", CHANGE, (144, 238, 144)),
    ("nodule", "27925004", "Nodule", CHANGE, (180, 220, 120)),
    ("cyst", "367643001", "Cyst", CHANGE, (205, 205, 100)),
    ("edema, oedema", "79654002", "Edema", CHANGE, (140, 224, 228)),
    ("necrosis", "6574001", "Necrosis", CHANGE, (216, 191, 216)),
    ("hemorrhage, haemorrhage", "50960005", "Hemorrhage", CHANGE, (188, 65, 28)),
    ("pleural effusion", "60046008", "Pleural effusion", CHANGE, (120, 190, 150)),
    ("pneumothorax", "36118008", "Pneumothorax", CHANGE, (150, 200, 230)),
    ("blood", "87612001", "Blood", SUBSTANCE, (216, 101, 79)),
    ("cerebrospinal fluid, csf", "65216001", "Cerebrospinal Fluid", SUBSTANCE, (85, 188, 255)),
    ("air", "15158005", "Air", SUBSTANCE, (180, 220, 240)),
)
"""Names in lower case, code (SCT) and meaning as PS3.16 lists them, category, colour."""
# fmt: on
_COLOURS = (
    *((230, 75, 60), (60, 150, 230), (80, 190, 90), (240, 180, 40), (160, 90, 200)),
    *((60, 190, 190), (230, 120, 180), (150, 150, 70), (120, 100, 80), (90, 110, 230)),
)
"""For structures whose colour nobody has chosen, one after the other."""


def read_concepts(path: Path) -> dict[str, Concept]:
    """Read a table of structures: TOML or JSON.

    ::

        ["left ventricle"]
        category = ["91723000", "SCT", "Anatomical Structure"]  # this one if left out
        type = ["87878005", "SCT", "Left ventricle"]
        modifier = ["7771000", "SCT", "Left"]                    # optional
        region = ["80891009", "SCT", "Heart"]                    # optional
        colour = [205, 95, 80]                                   # optional

    Raises
    ------
    InputError
        If it cannot be read, an entry is not of that form, or two names differ in case, hyphens
        and underscores alone.
    """
    try:
        text = read_text(path)
        table = json.loads(text) if path.suffix.lower() == ".json" else _toml(text)
    except OSError as error:
        raise InputError(f"the table of codes {path} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:  # of both parsers
        raise InputError(f"{path} is no table of codes in TOML or JSON: {error}.") from error
    if not isinstance(table, dict):
        raise InputError(f"{path} must map structures to their codes.")
    by_name: dict[str, str] = {}
    for name in table:
        if by_name.setdefault(_plain(name), name) != name:
            raise InputError(
                f"{path} has codes of '{by_name[_plain(name)]}' and of '{name}', which are one "
                "name. Keep one of them."
            )
    return {name: _concept(path, name, entry, at) for at, (name, entry) in enumerate(table.items())}


def concepts_for(
    structures: Iterable[str], chosen: Mapping[str, Concept] | None = None
) -> dict[str, Concept]:
    """Return what is known of each structure: from ``chosen``, else the built-in table.

    Names are compared without regard to case, hyphens and underscores; ``left`` and ``right`` in a
    name that the table has without them become the modifier.
    """
    chosen = {_plain(name): concept for name, concept in (chosen or {}).items()}
    found: dict[str, Concept] = {}
    for at, name in enumerate(structures):
        concept = chosen.get(_plain(name)) or _BUILT_IN.get(_plain(name)) or _with_side(name)
        colour = _COLOURS[at % len(_COLOURS)]
        found[name] = concept or Concept(TISSUE, TISSUE, colour=colour, known=False)
    return found


def _with_side(name: str) -> Concept | None:
    words = _plain(name).split()
    for word, side in SIDES.items():
        if word in words:
            rest = " ".join(other for other in words if other != word)
            concept = _BUILT_IN.get(rest)
            if concept is not None:
                return Concept(concept.category, concept.type, side, concept.region, concept.colour)
    return None


def _plain(name: str) -> str:
    return " ".join(name.casefold().replace("_", " ").replace("-", " ").split())


_BUILT_IN = {
    name: Concept(category, Code(value, "SCT", meaning), colour=colour)
    for names, value, meaning, category, colour in _TABLE
    for name in names.split(", ")
}


def _entry(code: Code) -> str:
    return str(code).replace("~", "-").replace("|", "-")


def _toml(text: str) -> Any:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    return tomllib.loads(text)


def _concept(path: Path, name: str, entry: Any, at: int) -> Concept:
    if not isinstance(entry, dict) or "type" not in entry:
        raise InputError(f"{path}: '{name}' needs a type, e.g. ['10200004', 'SCT', 'Liver'].")
    unknown = sorted(set(entry) - {"category", "type", "modifier", "region", "colour"})
    if unknown:
        raise InputError(
            f"{path}: '{name}' has the entry '{unknown[0]}'; expected category, type, modifier, "
            "region, colour."
        )
    codes = {key: _code(path, name, key, value) for key, value in entry.items() if key != "colour"}
    colour = entry.get("colour", list(_COLOURS[at % len(_COLOURS)]))
    if (
        not isinstance(colour, list)
        or len(colour) != 3
        or not all(type(c) is int and 0 <= c <= 255 for c in colour)
    ):
        raise InputError(f"{path}: the colour of '{name}' must be three numbers from 0 to 255.")
    return Concept(
        codes.get("category", ANATOMY),
        codes["type"],
        codes.get("modifier"),
        codes.get("region"),
        (colour[0], colour[1], colour[2]),
    )


def _code(path: Path, name: str, key: str, value: Any) -> Code:
    limits = (16, 16, 64)  # SH, SH and LO (PS3.5, 6.2)
    if (
        not isinstance(value, list)
        or len(value) != 3
        or not all(isinstance(part, str) and part.strip() for part in value)
        or not all(part.isprintable() and "\\" not in part for part in value)
        or any(len(part) > limit for part, limit in zip(value, limits, strict=True))
    ):
        raise InputError(
            f"{path}: the {key} of '{name}' must read like ['10200004', 'SCT', 'Liver'] (value, "
            "coding scheme, meaning; at most 16, 16 and 64 printable characters), got "
            f"{value!r}."
        )
    return Code(*value)
