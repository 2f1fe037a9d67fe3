"""ONNX Runtime sessions: provider choice that says what it chose, fixed threads, no silent fall-back."""

from pathlib import Path

import onnxruntime as ort

from server.errors import UnavailableError

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"


def open_session(path: Path, *, provider: str, threads: int) -> ort.InferenceSession:
    """Opens a graph on CUDA or CPU.

    Args:
        path: the ONNX file, its checksum already verified.
        provider: ``cpu``, ``cuda`` (fails without it) or ``auto`` (CUDA where a device answers).
        threads: intra-op threads; equal everywhere, because the order of a sum may depend on it.

    Raises:
        UnavailableError: CUDA was demanded and ONNX Runtime fell back to the CPU, which it does without complaint.
    """
    ort.disable_telemetry_events()
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 3
    # Idle spinning of one session's threads would take the cores from the next one.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    wanted = [CUDA, CPU] if provider != "cpu" and _cuda_offered() else [CPU]
    session = ort.InferenceSession(str(path), options, providers=wanted)
    if provider == "cuda" and CUDA not in session.get_providers():
        raise UnavailableError("CUDA was asked for but is not available", reason="CUDA_UNAVAILABLE")
    return session


def _cuda_offered() -> bool:
    # The GPU wheel lists CUDA even on machines without a device; the device file is what tells them apart.
    return CUDA in ort.get_available_providers() and Path("/dev/nvidiactl").exists()


def provider_of(session: ort.InferenceSession) -> str:
    """Returns ``cuda`` or ``cpu``: where the session really runs."""
    return "cuda" if CUDA in session.get_providers() else "cpu"
