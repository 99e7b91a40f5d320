"""One run while it goes on: shared set-up, jobs in their order, reuse, progress."""

__all__: list[str] = []
