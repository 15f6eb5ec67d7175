"""The decode side of the KV stream: one receiver thread for each pair.

    engine thread               receiver thread of a pair
    client.py: DecodeClient     receiver.py: Receiver, over control.py: ControlConnection
      reserve, cancel,            HELLO ▸ WELCOME ▸ RESERVE … ▸ process group ▸
      prewarm, take_results       HEADER ▸ receive ▸ scatter ▸ … ▸ END
            │                         │      ▲                        ▲
            ▼                         ▼      │ the peer's outbox      │ pair.receive
    ┌───────────────────────────────────────────────────────────────────────┐
    │ transfers.py: ReceiveTransfers, the state that all threads share      │
    └───────────────────────────────────────────────────────────────────────┘

One lock, ``ReceiveTransfers.lock``, guards all state except some fields of ``Peer`` (records.py
lists them). Every method of ReceiveTransfers needs the lock. No thread waits for a peer while it
holds the lock. Each receiver owns its control socket. Other threads post control messages to
``Peer.outbox``, and the receiver of this peer sends them. A peer that is slow or dies costs only
its own transfers.

Only receiver threads write incoming KV into blocks. A receiver copies a message from its staging
buffer only if the leg has not ended, and marks the leg as ``scattering`` during the copy. A
transfer is reported to the engine when all of its legs have ended and none is scattering, so a
block is never written after the report.
"""
