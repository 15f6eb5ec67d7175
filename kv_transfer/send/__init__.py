"""The prefill side of the KV stream: a control thread, and one sender thread for each pair.

    engine thread               control thread              sender thread of a pair
    server.py: PrefillServer    control.py: ControlServer   sender.py: Sender
      begin_step, layer_done,     HELLO: starts a sender      next_message ▸ post HEADER ▸
      end_step, preempt,          RESERVE, CANCEL, BYE        gather ▸ send ▸ … ▸ post END
      request_finished            RELEASE, PING               sleeps on its peer's ``wake``
            │                         │      ▲                        │          │
            ▼                         ▼      │ outbox                 ▼          ▼
    ┌───────────────────────────────────────────────────────────────────────┐  pair.send
    │ transfers.py: SendTransfers, the state that all threads share         │
    └───────────────────────────────────────────────────────────────────────┘

One lock, ``SendTransfers.lock``, guards all state. Every method of SendTransfers needs it, except
``post``. No thread waits for a peer while it holds the lock, so the engine's step never waits for a
peer. Only ``preempt`` waits for a sender. The wait takes as long as one gather, and ``preempt``
releases the lock meanwhile. A sender sleeps until its pair may have a whole message or an END to
send.

Other threads never use the control thread's socket: they post to the outbox.
"""
