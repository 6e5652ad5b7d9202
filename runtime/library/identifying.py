"""Which tags say who somebody is, and keys that say nothing."""

from __future__ import annotations

import hashlib
import re
import secrets

__all__ = ["identifies", "is_random_key", "random_key"]

_WORDS = """
accession accessionnumber address birth birthdate birthday birthplace case caseid cases dob doctor
donor donorid email encounter episode examid firstname forename given group guid id identifier
identifiers identity ids instanceuid insurance lastname mail medicalrecordnumber mrn name names nhs
nickname observer occupant occupation operator operators participant patient patients pesel
person phone physician physicians pid proband radiologist referring requester seriesid
seriesinstanceuid seriesuid sopinstanceuid ssn studyid studyinstanceuid studyuid subject subjects
surname telephone uid uids uuid visitid volunteer
"""
_SOUND_SO = """
codingschemename coilname devicename manufacturermodelname modelname patientage patientorientation
patientposition patientsex patientsize patientweight protocolname sequencename softwarename
structurename
"""
_IDENTIFYING, _HARMLESS = frozenset(_WORDS.split()), frozenset(_SOUND_SO.split())
_WORD = re.compile("UIDs|IDs|[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+|[^\\W\\d_A-Za-z]+")
_UID = re.compile(r"[0-2](\.(0|[1-9][0-9]*)){4,}")
_LEAST_UID = 16


def random_key() -> str:
    """Return a key that says nothing: 32 hex digits, 96 random bits and 32 that check them."""
    drawn = secrets.token_hex(12)
    return drawn + _check_digits(drawn)


def is_random_key(key: str) -> bool:
    """Whether a key is one of :func:`random_key`, by its check digits."""
    return len(key) == 32 and key[24:] == _check_digits(key[:24])


def _check_digits(drawn: str) -> str:
    return hashlib.sha256(b"recallseg-key\0" + drawn.encode()).hexdigest()[:8]


def identifies(name: str, value: str) -> bool:
    """Whether a tag says who somebody is, by its name or by the form of its value.

    Names are taken apart at capitals, ``_``, ``-`` and spaces, and one word is enough: patient,
    subject, case, donor, name, birth, address, phone, mail, insurance, mrn, ssn, accession, id,
    uid, physician, operator, group, ... So are DICOM's PatientID, PatientName, OtherPatientIDs,
    PatientBirthDate, AccessionNumber, StudyID, ReferringPhysicianName, DeviceUID and their like.
    Exempt are names that only sound so, such as PatientAge, PatientSex and ProtocolName. Of values:
    DICOM's UIDs, and person names with ``^``.
    """
    words = [word.lower() for word in _WORD.findall(name)]
    joined = "".join(words)
    if joined in _HARMLESS:
        return False
    uid = len(value) >= _LEAST_UID and _UID.fullmatch(value) is not None
    sounds = joined.startswith(("patient", "subject"))
    return uid or "^" in value or sounds or not _IDENTIFYING.isdisjoint((joined, *words))
