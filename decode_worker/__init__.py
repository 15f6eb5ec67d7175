"""What only decode workers do: the Decode service.

Nothing here may know text, Ray or the prefill pool.
"""
