"""State-space duality (SSD): the chunked scan, one decoding step, and the references that they are tested against."""

from transxssm.ops.ssd.interface import (
    DEFAULT_CHUNK_SIZE,
    SSDBackend,
    ssd_chunk_scan,
    ssd_chunk_scan_,
    ssd_step,
    ssd_step_,
)
from transxssm.ops.ssd.reference import ssd_dual_form, ssd_recurrence

__all__ = [
    "DEFAULT_CHUNK_SIZE",
    "SSDBackend",
    "ssd_chunk_scan",
    "ssd_chunk_scan_",
    "ssd_dual_form",
    "ssd_recurrence",
    "ssd_step",
    "ssd_step_",
]
