"""One thin adapter per backend: ``NAME``, ``why_not``, ``forward``, ``backward``, ``kept_shape``.

``stages`` drives the five stages for any backend that offers them one by one.
"""
