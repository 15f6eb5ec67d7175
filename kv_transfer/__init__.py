"""The KV stream between a prefill and a decode worker.

geometry      what a KV cache looks like; which bytes a message carries
wire          the control messages
session       one transfer as a state machine, without I/O
kv_caches     gather from and scatter into an engine's KV caches
side_stream   keeps the KV stream's copies in order with an engine's kernels on CUDA
pair          the 2-rank process group that carries tensors
options       settings of the KV stream
local_rank    what all pairs of one rank share: its caches, geometry, settings, clock
outbox        messages that other threads hand to the thread that owns a socket
send/         the prefill side: one control thread, one sender thread for each pair
receive/      the decode side: one receiver thread for each pair
doorbell      wakes an idle decode engine when a transfer has a result
rank_reports  what ranks report to their engine's front end
releaser      how the front end makes its ranks drop KV
vllm/         the connector that vLLM loads; the only folder that depends on vLLM

Words:

* A *pair* connects one prefill rank and one decode rank. It has a control connection, and also a
  process group if KV travels between the two ranks.
* A *transfer* carries the prompt's KV for one attempt of a request. Its ``transfer_id`` is
  "request_id#attempt". It has *ended* when it has completed, failed or been cancelled.
* A *leg* is the part of a transfer between one prefill rank and one decode rank.
* A *block unit* (short: unit) is the smallest run of tokens that a pair sends; see ``geometry``.
* Other things end with other words: a vLLM request is *finished*, a pair is *closed*, blocks are
  *released*, and a result is *reported*.
"""
