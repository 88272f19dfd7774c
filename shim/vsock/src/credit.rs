//! Credit: how much each side may send without having heard more from the other (virtio 1.2, 5.10.6.3).
//! Pure arithmetic on counters that wrap at 2^32. Nothing here trusts what the guest says.

/// Our right to send to the guest, as far as the guest has told us.
#[derive(Clone, Copy, Debug)]
pub struct SendCredit {
    peer_alloc: u32,
    peer_forwarded: u32,
    sent: u32,
}

impl SendCredit {
    /// Starts with nothing: the first packet of the guest brings credit.
    pub fn new() -> Self {
        SendCredit { peer_alloc: 0, peer_forwarded: 0, sent: 0 }
    }

    /// Takes what a packet's header says. A `fwd_cnt` that is older than one already heard (two CPUs of the guest can queue
    /// their packets in the other order), or that claims more than was sent, is ignored.
    pub fn heard(&mut self, buf_alloc: u32, fwd_cnt: u32) {
        self.peer_alloc = buf_alloc;
        let advance = fwd_cnt.wrapping_sub(self.peer_forwarded);
        if advance <= self.in_flight() {
            self.peer_forwarded = fwd_cnt;
        }
    }

    /// Bytes that may be sent now. Zero also when the guest has shrunk its buffer below what is on its way.
    pub fn available(&self) -> u32 {
        self.peer_alloc.saturating_sub(self.in_flight())
    }

    /// Counts `n` bytes as sent.
    pub fn sent(&mut self, n: u32) {
        self.sent = self.sent.wrapping_add(n);
    }

    fn in_flight(&self) -> u32 {
        self.sent.wrapping_sub(self.peer_forwarded)
    }
}

/// The guest's right to send to us, and what of it is used.
#[derive(Clone, Copy, Debug)]
pub struct ReceiveCredit {
    window: u32,
    received: u32,
    forwarded: u32,
    told: u32,
}

impl ReceiveCredit {
    /// A window of `window` bytes: never more than that is held for the host's side.
    pub fn new(window: u32) -> Self {
        ReceiveCredit { window, received: 0, forwarded: 0, told: 0 }
    }

    /// Takes `n` bytes in, or refuses them all: the guest has ignored its credit.
    pub fn received(&mut self, n: u32) -> bool {
        if n > self.window - self.held() {
            return false;
        }
        self.received = self.received.wrapping_add(n);
        true
    }

    /// Counts `n` of the bytes held as gone to the host's side; more than are held counts as all of them.
    pub fn forwarded(&mut self, n: u32) {
        self.forwarded = self.forwarded.wrapping_add(n.min(self.held()));
    }

    /// Bytes received and not yet forwarded: at most the window.
    pub fn held(&self) -> u32 {
        self.received.wrapping_sub(self.forwarded)
    }

    /// Whether so much of the window came free since the guest last heard of it that it should hear now. A quarter: with the
    /// whole window used up, three quarters of it still cover the time that the update needs to arrive.
    pub fn should_tell(&self) -> bool {
        self.forwarded.wrapping_sub(self.told) >= self.window / 4
    }

    /// `buf_alloc` and `fwd_cnt` for a header that goes out now.
    pub fn tell(&mut self) -> (u32, u32) {
        self.told = self.forwarded;
        (self.window, self.forwarded)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn send_credit_survives_the_wrap() {
        let mut credit = SendCredit { peer_alloc: 100, peer_forwarded: u32::MAX - 10, sent: u32::MAX - 10 };
        assert_eq!(credit.available(), 100);
        credit.sent(60);
        assert_eq!(credit.available(), 40);
        credit.heard(100, (u32::MAX - 10).wrapping_add(60));
        assert_eq!(credit.available(), 100);
    }

    #[test]
    fn send_credit_ignores_what_cannot_be() {
        let mut credit = SendCredit::new();
        credit.heard(100, 0);
        credit.sent(80);
        // (buf_alloc, fwd_cnt) as heard in turn, and what may be sent after it
        for (alloc, forwarded, available) in [
            (100, 81, 20),       // more forwarded than was sent
            (100, u32::MAX, 20), // before the beginning
            (100, 50, 70),
            (100, 30, 70), // overtaken by the one before
            (10, 50, 0),   // shrunk below what is in flight
            (100, 80, 100),
            (u32::MAX, 80, u32::MAX),
        ] {
            credit.heard(alloc, forwarded);
            assert_eq!(credit.available(), available, "after ({alloc}, {forwarded})");
        }
    }

    #[test]
    fn receive_credit_bounds_what_is_held() {
        let mut credit =
            ReceiveCredit { window: 100, received: u32::MAX - 5, forwarded: u32::MAX - 5, told: u32::MAX - 5 };
        assert!(credit.received(100));
        assert!(!credit.received(1));
        assert_eq!(credit.held(), 100);
        credit.forwarded(24);
        assert!(!credit.should_tell());
        credit.forwarded(1);
        assert!(credit.should_tell());
        assert_eq!(credit.tell(), (100, (u32::MAX - 5).wrapping_add(25)));
        assert!(!credit.should_tell());
        assert!(!credit.received(26));
        assert!(credit.received(25));
        credit.forwarded(u32::MAX);
        assert_eq!(credit.held(), 0);
    }
}
