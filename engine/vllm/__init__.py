"""vLLM behind the engine protocol. Only this folder of the package may import vLLM.

This module imports nothing, because vLLM takes seconds to import.
"""
