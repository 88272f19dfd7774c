//! One connection's state machine (virtio 1.2, 5.10.6.2 to 5.10.6.6). Pure: it counts bytes and never sees them.
//!
//! What happened comes in as a method call (`hear` for the guest's packets, `host_*` for the host's socket), what to do comes out of
//! `hear`, `plan` and `host_half_close`. Who the connection is (ports, CIDs), and the RST for it, live in `table.rs`.
//!
//! Half-close, both ways, in the order that loses nothing: the guest's SHUTDOWN(SEND) reaches the host's socket only after all bytes
//! held for it; the host's end of file becomes SHUTDOWN(SEND) only after all its bytes were sent.

use super::credit::{ReceiveCredit, SendCredit};
use super::header::{Header, Op, Shut};

/// Where a connection is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// The host has asked for it; `said` once the REQUEST went out.
    Requesting { said: bool },
    /// Both sides know of it; `response_due` until our RESPONSE went out.
    Open { response_due: bool },
    /// The guest's end is over. Bytes that it sent before are still delivered to the host.
    Ended,
}

/// What a packet of the guest means for the host's side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Heard {
    /// Nothing to be done there, except what `plan` and `host_half_close` now say.
    Nothing,
    /// The payload is to be delivered, and counted with `host_took` as it goes.
    Data,
    /// The guest has accepted the host's request.
    Connected,
    /// The guest's end is over: refused, closed, or reset. What is held for the host may still be delivered.
    Ended {
        /// Whether the guest is owed an RST, the last word of an orderly end.
        rst: bool,
    },
    /// The guest broke the protocol: it gets an RST, and the host's side is closed at once.
    Violation,
}

/// What the connection wants to send to the guest next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Plan {
    /// Nothing.
    Idle,
    /// A packet without payload: take it with `control`.
    Control,
    /// Payload, at most `limit` bytes: read them from the host, then call `data`, `host_drained` or `host_eof`.
    Data {
        /// The guest's credit, bytes.
        limit: u32,
    },
}

/// The part of an outgoing header that depends on the connection's state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Say {
    /// What the packet asks for.
    pub op: Op,
    /// The flags of a SHUTDOWN.
    pub shut: Shut,
    /// Bytes of payload.
    pub len: u32,
    /// Our receive window, bytes.
    pub buf_alloc: u32,
    /// Bytes that have left our buffer, modulo 2^32.
    pub fwd_cnt: u32,
}

/// One connection between a port of the guest and a stream of the host.
#[derive(Clone, Debug)]
pub struct Connection {
    phase: Phase,
    send: SendCredit,
    receive: ReceiveCredit,
    /// What the guest has declared that it will not do any more.
    guest_shut: Shut,
    /// What the host's side will not do any more: SEND after its end of file, RECEIVE when nobody takes bytes there.
    host_shut: Shut,
    /// What of `host_shut` the guest was told.
    told: Shut,
    /// What of `guest_shut` was carried to the host's socket.
    carried: Shut,
    /// Whether the host's socket may have bytes or an end of file for us.
    host_ready: bool,
    update_due: bool,
    /// A CREDIT_REQUEST is out, or was answered with nothing: one is enough, the guest owes updates by itself.
    asked_for_credit: bool,
}

impl Connection {
    /// A connection that the host asks for.
    pub fn requesting(window: u32) -> Self {
        Self::new(Phase::Requesting { said: false }, window)
    }

    /// A connection that the guest asked for with `request`, and gets.
    pub fn accepted(window: u32, request: &Header) -> Self {
        let mut connection = Self::new(Phase::Open { response_due: true }, window);
        connection.send.heard(request.buf_alloc, request.fwd_cnt);
        connection
    }

    fn new(phase: Phase, window: u32) -> Self {
        Connection {
            phase,
            send: SendCredit::new(),
            receive: ReceiveCredit::new(window),
            guest_shut: Shut::NONE,
            host_shut: Shut::NONE,
            told: Shut::NONE,
            carried: Shut::NONE,
            host_ready: false,
            update_due: false,
            asked_for_credit: false,
        }
    }

    /// Takes a packet of the guest for this connection.
    pub fn hear(&mut self, header: &Header) -> Heard {
        self.send.heard(header.buf_alloc, header.fwd_cnt);
        if self.send.available() > 0 {
            self.asked_for_credit = false;
        }
        match (self.phase, header.op) {
            (Phase::Ended, _) => Heard::Nothing,
            (_, Some(Op::Rst)) => self.end(false),
            (Phase::Requesting { said: true }, Some(Op::Response)) => {
                self.phase = Phase::Open { response_due: false };
                Heard::Connected
            }
            (Phase::Requesting { .. }, _) => self.violation(),
            (Phase::Open { .. }, Some(Op::Rw)) => self.hear_payload(header.len),
            (Phase::Open { .. }, Some(Op::CreditUpdate)) => Heard::Nothing,
            (Phase::Open { .. }, Some(Op::CreditRequest)) => {
                self.update_due = true;
                Heard::Nothing
            }
            (Phase::Open { .. }, Some(Op::Shutdown)) => self.hear_shutdown(header.shut),
            (Phase::Open { .. }, Some(Op::Request | Op::Response) | None) => self.violation(),
        }
    }

    fn hear_payload(&mut self, len: u32) -> Heard {
        if self.guest_shut.has(Shut::SEND) || !self.receive.received(len) {
            return self.violation();
        }
        if self.host_shut.has(Shut::RECEIVE) {
            // Nobody takes it. Its credit goes back: a sender that has not heard of our SHUTDOWN must not wait for ever.
            self.host_took(len);
            return Heard::Nothing;
        }
        if len == 0 { Heard::Nothing } else { Heard::Data }
    }

    fn hear_shutdown(&mut self, shut: Shut) -> Heard {
        self.guest_shut.add(shut);
        if self.guest_shut.has(Shut::BOTH) {
            return self.end(true);
        }
        if self.guest_shut.has(Shut::RECEIVE) {
            // What the host would still send has no receiver: as good as its end of file.
            self.host_eof();
        }
        self.settle();
        Heard::Nothing
    }

    fn end(&mut self, rst: bool) -> Heard {
        self.phase = Phase::Ended;
        self.guest_shut = Shut::BOTH;
        Heard::Ended { rst }
    }

    fn violation(&mut self) -> Heard {
        self.phase = Phase::Ended;
        Heard::Violation
    }

    /// The host's socket may have something to read.
    pub fn host_readable(&mut self) {
        self.host_ready = !self.host_shut.has(Shut::SEND);
    }

    /// The host's socket has nothing to read for now.
    pub fn host_drained(&mut self) {
        self.host_ready = false;
    }

    /// The host's side will not send any more, and all that it had sent went out.
    pub fn host_eof(&mut self) {
        self.host_ready = false;
        self.host_shut.add(Shut::SEND);
        self.settle();
    }

    /// The host's side took `n` of the bytes that were held for it.
    pub fn host_took(&mut self, n: u32) {
        self.receive.forwarded(n);
        self.settle();
    }

    /// The host's side takes no more bytes. What is held for it is to be dropped.
    pub fn host_refuses(&mut self) {
        self.host_shut.add(Shut::RECEIVE);
        self.receive.forwarded(u32::MAX);
        self.settle();
    }

    fn settle(&mut self) {
        // With both directions at their end nothing can come any more: the orderly end needs both flags in what the guest hears.
        if self.guest_shut.has(Shut::SEND) && self.host_shut.has(Shut::SEND) && self.held() == 0 {
            self.host_shut.add(Shut::RECEIVE);
        }
    }

    /// The directions in which the host's socket is to be shut down now: SEND is `SHUT_WR` (its reader sees the end of file),
    /// RECEIVE is `SHUT_RD` (its writer is refused). Each is answered once.
    pub fn host_half_close(&mut self) -> Shut {
        let mut now = Shut::NONE;
        if self.guest_shut.has(Shut::RECEIVE) && !self.carried.has(Shut::RECEIVE) {
            now.add(Shut::RECEIVE);
        }
        if self.guest_shut.has(Shut::SEND) && !self.carried.has(Shut::SEND) && self.held() == 0 {
            now.add(Shut::SEND);
        }
        self.carried.add(now);
        now
    }

    /// Bytes received from the guest that the host's side has not taken; never more than the window.
    pub fn held(&self) -> u32 {
        self.receive.held()
    }

    /// Whether the guest has not answered yet.
    pub fn is_requesting(&self) -> bool {
        matches!(self.phase, Phase::Requesting { .. })
    }

    /// Whether the guest's end is over, so that only what is held for the host keeps the connection.
    pub fn is_ended(&self) -> bool {
        self.phase == Phase::Ended
    }

    /// Whether the guest has been told of the connection, so that it needs an RST when the host gives up.
    pub fn guest_knows(&self) -> bool {
        match self.phase {
            Phase::Requesting { said } => said,
            // Before our RESPONSE it waits for an answer, and the RST is one.
            Phase::Open { .. } => true,
            Phase::Ended => false,
        }
    }

    /// What to send to the guest next.
    pub fn plan(&self) -> Plan {
        match self.phase {
            Phase::Requesting { said: false } | Phase::Open { response_due: true } => return Plan::Control,
            Phase::Requesting { said: true } | Phase::Ended => return Plan::Idle,
            Phase::Open { response_due: false } => {}
        }
        let limit = if self.host_ready { self.send.available() } else { 0 };
        if limit > 0 {
            Plan::Data { limit }
        } else if self.next_control().is_some() {
            Plan::Control
        } else {
            Plan::Idle
        }
    }

    fn next_control(&self) -> Option<Op> {
        match self.phase {
            Phase::Requesting { said: false } => Some(Op::Request),
            Phase::Open { response_due: true } => Some(Op::Response),
            Phase::Requesting { said: true } | Phase::Ended => None,
            Phase::Open { response_due: false } => {
                if !self.told.has(self.host_shut) {
                    Some(Op::Shutdown)
                } else if self.update_due || self.receive.should_tell() && !self.guest_shut.has(Shut::SEND) {
                    Some(Op::CreditUpdate)
                } else if self.host_ready && self.send.available() == 0 && !self.asked_for_credit {
                    Some(Op::CreditRequest)
                } else {
                    None
                }
            }
        }
    }

    /// The packet without payload that is due, counted as sent.
    pub fn control(&mut self) -> Option<Say> {
        let op = self.next_control()?;
        let mut shut = Shut::NONE;
        match op {
            Op::Request => self.phase = Phase::Requesting { said: true },
            Op::Response => self.phase = Phase::Open { response_due: false },
            Op::Shutdown => {
                self.told.add(self.host_shut);
                shut = self.told;
            }
            Op::CreditRequest => self.asked_for_credit = true,
            Op::CreditUpdate | Op::Rw | Op::Rst => {}
        }
        Some(self.say(op, shut, 0))
    }

    /// The header for `len` bytes of payload, counted as sent. `len` is at most the plan's limit.
    pub fn data(&mut self, len: u32) -> Say {
        self.send.sent(len);
        self.say(Op::Rw, Shut::NONE, len)
    }

    fn say(&mut self, op: Op, shut: Shut, len: u32) -> Say {
        self.update_due = false;
        let (buf_alloc, fwd_cnt) = self.receive.tell();
        Say { op, shut, len, buf_alloc, fwd_cnt }
    }
}
