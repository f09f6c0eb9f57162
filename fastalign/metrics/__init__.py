"""Modality integration rate (MIR) and the Frechet distance beneath it."""

from fastalign.metrics._frechet import frechet_distance
from fastalign.metrics._mir import ModalityIntegrationRate, modality_integration_rate

__all__ = ["ModalityIntegrationRate", "frechet_distance", "modality_integration_rate"]
