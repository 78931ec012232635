"""The backends: a subclass of ``base.Backend`` in each module, its instance called ``BACKEND``."""
