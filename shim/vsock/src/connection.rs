//! The state machine of one connection (virtio 1.2, 5.10.6.2 to 5.10.6.6). Pure: it counts bytes and never sees them.
//!
//! Events come in as method calls: `receive` for the guest's packets, `host_*` for the host's socket. Decisions come
//! out of `receive`, `next_send` and `take_half_close`. `table.rs` keeps the connection's addresses and sends its RST.
//!
//! Half-closes lose no bytes in either direction: the guest's SHUTDOWN(SEND) reaches the host's socket only after all
//! bytes held for it, and the host's end of file becomes SHUTDOWN(SEND) only after all its bytes were sent.

use crate::credit::{ReceiveCredit, SendCredit};
use crate::header::{Header, Op, Shut};

/// The phase of a connection's life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// The host wants the connection. `sent`: the REQUEST has been sent.
    Requesting { sent: bool },
    /// Both sides know the connection. `response_due`: the RESPONSE has not been sent yet.
    Open { response_due: bool },
    /// The guest's end is closed. Bytes that it sent earlier are still delivered to the host.
    Ended,
}

/// What a packet from the guest means for the host's end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Effect {
    /// Nothing beyond what `next_send` and `take_half_close` now return.
    Nothing,
    /// Deliver the payload, and report it with `host_consumed` as the socket accepts it.
    Payload,
    /// The guest has accepted the host's request.
    Connected,
    /// The guest's end is closed: refused, shut down, or reset. Bytes held for the host may still be delivered.
    Ended {
        /// Whether the guest is owed an RST, which completes an orderly shutdown.
        rst: bool,
    },
    /// The guest broke the protocol: send an RST and close the host's end at once.
    Violation,
}

/// What the connection has to send to the guest next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NextSend {
    /// Nothing.
    Nothing,
    /// A packet without payload: take it with `control`.
    Control,
    /// Payload: read up to `limit` bytes from the host, then call `data`, `host_drained` or `host_eof`.
    Payload {
        /// The guest's credit, bytes.
        limit: u32,
    },
}

/// The fields of an outgoing header that depend on the connection's state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Outgoing {
    pub(crate) op: Op,
    /// The flags of a SHUTDOWN.
    pub(crate) shut: Shut,
    /// Size of the payload, bytes.
    pub(crate) len: u32,
    /// The device's receive window, bytes.
    pub(crate) buf_alloc: u32,
    /// Bytes forwarded to the host so far, modulo 2^32.
    pub(crate) fwd_cnt: u32,
}

/// A connection between a port of the guest and a socket of the host.
#[derive(Clone, Debug)]
pub struct Connection {
    phase: Phase,
    send: SendCredit,
    receive: ReceiveCredit,
    /// Directions that the guest has closed.
    guest_shut: Shut,
    /// Directions that the host's end has closed: SEND after its end of file, RECEIVE when it has no reader.
    host_shut: Shut,
    /// The part of `host_shut` that was sent to the guest.
    announced: Shut,
    /// The part of `guest_shut` that was applied to the host's socket.
    applied: Shut,
    /// Whether the host's socket may have bytes or an end of file.
    host_ready: bool,
    update_due: bool,
    /// A CREDIT_REQUEST was sent, and the guest has given no credit since. One request is enough: the guest must
    /// announce new credit on its own.
    credit_requested: bool,
}

impl Connection {
    /// A connection that the host requests.
    pub(crate) fn requesting(window: u32) -> Self {
        Self::new(Phase::Requesting { sent: false }, window)
    }

    /// A connection that the guest requested with `request` and that the host accepts.
    pub(crate) fn accepted(window: u32, request: &Header) -> Self {
        let mut connection = Self::new(Phase::Open { response_due: true }, window);
        connection.send.update(request.buf_alloc, request.fwd_cnt);
        connection
    }

    fn new(phase: Phase, window: u32) -> Self {
        Connection {
            phase,
            send: SendCredit::new(),
            receive: ReceiveCredit::new(window),
            guest_shut: Shut::NONE,
            host_shut: Shut::NONE,
            announced: Shut::NONE,
            applied: Shut::NONE,
            host_ready: false,
            update_due: false,
            credit_requested: false,
        }
    }

    /// Handles a packet from the guest.
    pub(crate) fn receive(&mut self, header: &Header) -> Effect {
        self.send.update(header.buf_alloc, header.fwd_cnt);
        if self.send.available() > 0 {
            self.credit_requested = false;
        }
        match (self.phase, header.op) {
            (Phase::Ended, _) => Effect::Nothing,
            (_, Some(Op::Rst)) => self.end(false),
            (Phase::Requesting { sent: true }, Some(Op::Response)) => {
                self.phase = Phase::Open { response_due: false };
                Effect::Connected
            }
            (Phase::Requesting { .. }, _) => self.violation(),
            (Phase::Open { .. }, Some(Op::Rw)) => self.receive_payload(header.len),
            (Phase::Open { .. }, Some(Op::CreditUpdate)) => Effect::Nothing,
            (Phase::Open { .. }, Some(Op::CreditRequest)) => {
                self.update_due = true;
                Effect::Nothing
            }
            (Phase::Open { .. }, Some(Op::Shutdown)) => self.receive_shutdown(header.shut),
            (Phase::Open { .. }, Some(Op::Request | Op::Response) | None) => self.violation(),
        }
    }

    fn receive_payload(&mut self, len: u32) -> Effect {
        if self.guest_shut.has(Shut::SEND) || !self.receive.count_received(len) {
            return self.violation();
        }
        if self.host_shut.has(Shut::RECEIVE) {
            // The payload has no reader. Return its credit, so that a guest that has not yet received the SHUTDOWN does
            // not wait forever.
            self.host_consumed(len);
            return Effect::Nothing;
        }
        if len == 0 { Effect::Nothing } else { Effect::Payload }
    }

    fn receive_shutdown(&mut self, shut: Shut) -> Effect {
        self.guest_shut.add(shut);
        if self.guest_shut.has(Shut::BOTH) {
            return self.end(true);
        }
        if self.guest_shut.has(Shut::RECEIVE) {
            // Whatever the host still sends has no receiver, which amounts to the host's end of file.
            self.host_eof();
        }
        self.settle();
        Effect::Nothing
    }

    fn end(&mut self, rst: bool) -> Effect {
        self.phase = Phase::Ended;
        self.guest_shut = Shut::BOTH;
        Effect::Ended { rst }
    }

    fn violation(&mut self) -> Effect {
        self.phase = Phase::Ended;
        Effect::Violation
    }

    /// The host's socket may be readable.
    pub fn host_readable(&mut self) {
        self.host_ready = !self.host_shut.has(Shut::SEND);
    }

    /// The host's socket has nothing to read for now.
    pub fn host_drained(&mut self) {
        self.host_ready = false;
    }

    /// The host's end sends no more, and everything that it sent has been forwarded.
    pub fn host_eof(&mut self) {
        self.host_ready = false;
        self.host_shut.add(Shut::SEND);
        self.settle();
    }

    /// The host's socket accepted `n` of the held bytes.
    pub fn host_consumed(&mut self, n: u32) {
        self.receive.count_forwarded(n);
        self.settle();
    }

    /// The host's end accepts no more bytes. The caller discards the held bytes.
    pub(crate) fn host_stops_reading(&mut self) {
        self.host_shut.add(Shut::RECEIVE);
        self.receive.count_forwarded(u32::MAX);
        self.settle();
    }

    fn settle(&mut self) {
        // Both directions have ended, so the host receives no more either. An orderly shutdown needs both flags in the
        // SHUTDOWN to the guest.
        if self.guest_shut.has(Shut::SEND) && self.host_shut.has(Shut::SEND) && self.held() == 0 {
            self.host_shut.add(Shut::RECEIVE);
        }
    }

    /// The directions in which the host's socket must be shut down now: SEND is `SHUT_WR` (its reader gets an end of
    /// file), RECEIVE is `SHUT_RD` (its writer gets EPIPE). Returns each direction once.
    pub fn take_half_close(&mut self) -> Shut {
        let mut now = Shut::NONE;
        if self.guest_shut.has(Shut::RECEIVE) && !self.applied.has(Shut::RECEIVE) {
            now.add(Shut::RECEIVE);
        }
        if self.guest_shut.has(Shut::SEND) && !self.applied.has(Shut::SEND) && self.held() == 0 {
            now.add(Shut::SEND);
        }
        self.applied.add(now);
        now
    }

    /// Bytes received from the guest that the host's socket has not accepted, at most the window.
    pub fn held(&self) -> u32 {
        self.receive.held()
    }

    /// Whether the guest has not answered the host's request yet.
    pub(crate) fn is_requesting(&self) -> bool {
        matches!(self.phase, Phase::Requesting { .. })
    }

    /// Whether the guest's end is closed. Then only the bytes held for the host keep the connection.
    pub fn is_ended(&self) -> bool {
        self.phase == Phase::Ended
    }

    /// Whether the guest knows the connection, and so needs an RST if the host aborts it.
    pub(crate) fn is_known_to_guest(&self) -> bool {
        match self.phase {
            Phase::Requesting { sent } => sent,
            // Before the RESPONSE as well: the guest waits for an answer, and an RST is one.
            Phase::Open { .. } => true,
            Phase::Ended => false,
        }
    }

    /// What to send to the guest next.
    pub fn next_send(&self) -> NextSend {
        match self.phase {
            Phase::Requesting { sent: false } | Phase::Open { response_due: true } => return NextSend::Control,
            Phase::Requesting { sent: true } | Phase::Ended => return NextSend::Nothing,
            Phase::Open { response_due: false } => {}
        }
        let limit = if self.host_ready { self.send.available() } else { 0 };
        if limit > 0 {
            NextSend::Payload { limit }
        } else if self.next_control().is_some() {
            NextSend::Control
        } else {
            NextSend::Nothing
        }
    }

    fn next_control(&self) -> Option<Op> {
        match self.phase {
            Phase::Requesting { sent: false } => Some(Op::Request),
            Phase::Open { response_due: true } => Some(Op::Response),
            Phase::Requesting { sent: true } | Phase::Ended => None,
            Phase::Open { response_due: false } => {
                if !self.announced.has(self.host_shut) {
                    Some(Op::Shutdown)
                } else if self.update_due
                    || self.receive.is_update_due(self.send.peer_alloc()) && !self.guest_shut.has(Shut::SEND)
                {
                    Some(Op::CreditUpdate)
                } else if self.host_ready && self.send.available() == 0 && !self.credit_requested {
                    Some(Op::CreditRequest)
                } else {
                    None
                }
            }
        }
    }

    /// Returns the packet without payload that is due, and counts it as sent.
    pub(crate) fn control(&mut self) -> Option<Outgoing> {
        let op = self.next_control()?;
        let mut shut = Shut::NONE;
        match op {
            Op::Request => self.phase = Phase::Requesting { sent: true },
            Op::Response => self.phase = Phase::Open { response_due: false },
            Op::Shutdown => {
                self.announced.add(self.host_shut);
                shut = self.announced;
            }
            Op::CreditRequest => self.credit_requested = true,
            Op::CreditUpdate | Op::Rw | Op::Rst => {}
        }
        Some(self.outgoing(op, shut, 0))
    }

    /// Returns the header for `len` bytes of payload, and counts them as sent. `len` must not exceed the limit that
    /// `next_send` returned.
    pub(crate) fn data(&mut self, len: u32) -> Outgoing {
        self.send.count_sent(len);
        self.outgoing(Op::Rw, Shut::NONE, len)
    }

    fn outgoing(&mut self, op: Op, shut: Shut, len: u32) -> Outgoing {
        self.update_due = false;
        let (buf_alloc, fwd_cnt) = self.receive.announce();
        Outgoing { op, shut, len, buf_alloc, fwd_cnt }
    }
}
