"""Optional accelerators of dnc_gpt2.py: each is the same function as a readable one there, faster.

    dnc_scan   the DNC's recurrence fused, dnc_gpt2.dnc_loop        operator.py, cpu.py, cuda.py
    head       the LM head, dnc_gpt2.chunked_head_loss              head.py

The readable loop launches about a hundred small operators a token and saves all that they make.
Here one compiled loop a batch row runs through all T steps with the memory matrix at hand, and a
hand-derived backward recomputes the memory from states kept every CHECKPOINT_EVERY steps.
CPU: numba. CUDA: Triton. Where neither can run, `refusal` says why, and dnc_gpt2 runs its loop.
Nothing here imports dnc_gpt2.
"""

__all__ = ["dnc_scan", "refusal"]


def __getattr__(name: str):
    """Import the operator, and with it numba and triton, when it is first asked for."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from dnc_scan.operator import dnc_scan, refusal

    globals().update(dnc_scan=dnc_scan, refusal=refusal)
    return globals()[name]
