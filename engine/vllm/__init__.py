"""vLLM behind the engine protocol. The only folder of this package that may import vLLM.

It imports nothing by itself, because vLLM takes seconds to import.
"""
