"""The KV stream between a prefill and a decode worker.

geometry   what a KV cache looks like; which bytes a message carries
wire       the control messages
session    one transfer as a state machine, without I/O
kv_caches  gather from and scatter into an engine's paged cache
pair       the 2-rank process group that carries tensors
send/      the prefill side: control server, one sender thread per pair
receive/   the decode side: one thread per prefill peer
vllm/      the hooks that vLLM calls; the only folder that knows vLLM
"""
