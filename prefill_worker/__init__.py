"""What only prefill workers do: the Prefill service.

Nothing here may know text, Ray or the decode pool.
"""
