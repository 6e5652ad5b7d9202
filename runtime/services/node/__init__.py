"""The DICOM node: receives series, segments them, and sends the answer on."""
