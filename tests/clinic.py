"""A folder as a clinic exports it."""

from pathlib import Path

import numpy as np
from fakes import draw_scan
from scan_formats import save, save_dicom, slice_of

AXIAL = np.diag([-1.5, -2.0, 3.0, 1.0])
"""As scanners write axial slices: rows to the back, columns to the left, slices up."""


def draw_clinic(root: Path, cases: int = 5) -> dict[str, np.ndarray]:
    """A DICOM tree as a clinic exports it: a CT and a scout per patient, labels by ranges. Patient -> voxels."""
    drawn = {}
    rows = []
    for number in range(cases):
        patient = f"PAT{number:03d}"
        voxels = draw_scan(number)[0] - 150  # HU; the window of soft tissue shows the noise
        voxels[0] = -1000
        drawn[patient] = voxels
        said = {"PatientID": patient, "Modality": "CT"}
        save_dicom(root / f"export/{patient}/1/A", voxels, AXIAL, number, SeriesDescription="thorax 3mm", **said)
        save_dicom(root / f"export/{patient}/1/B", voxels[:, :, :2], AXIAL, SeriesDescription="thin", **said)
        held = slice_of(np.zeros((9, 9), np.int16), ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"], **said)
        held.SeriesInstanceUID = f"1.2.{number}"
        save(held, root / f"export/{patient}/scout")
        rows.append(f"{patient},1,4,tumour")
    (root / "labels.csv").write_text("case,from,to,class\n" + "\n".join(rows))
    return drawn
