"""Everything that times: ``directclr-fast bench`` (command), and the studies in study's frame."""
