//! Credit: how many bytes each side may send before the other announces more (virtio 1.2, 5.10.6.3). Pure arithmetic on
//! counters that wrap at 2^32. Nothing here trusts the guest's numbers.

/// The device's credit for sending to the guest, as the guest has announced it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SendCredit {
    peer_alloc: u32,
    peer_forwarded: u32,
    sent: u32,
}

impl SendCredit {
    /// Starts without credit. The guest's first packet announces some.
    pub(crate) fn new() -> Self {
        SendCredit { peer_alloc: 0, peer_forwarded: 0, sent: 0 }
    }

    /// Applies the announcement in a packet's header. Ignores a `fwd_cnt` that is older than an earlier one (two CPUs
    /// of the guest can queue their packets in the opposite order) or that exceeds what was sent.
    pub(crate) fn update(&mut self, buf_alloc: u32, fwd_cnt: u32) {
        self.peer_alloc = buf_alloc;
        let advance = fwd_cnt.wrapping_sub(self.peer_forwarded);
        if advance <= self.in_flight() {
            self.peer_forwarded = fwd_cnt;
        }
    }

    /// Bytes that may be sent now. Also zero if the guest has shrunk its buffer below the bytes in flight.
    pub(crate) fn available(&self) -> u32 {
        self.peer_alloc.saturating_sub(self.in_flight())
    }

    /// Counts `n` bytes as sent.
    pub(crate) fn count_sent(&mut self, n: u32) {
        self.sent = self.sent.wrapping_add(n);
    }

    /// The guest's own receive buffer, bytes.
    pub(crate) fn peer_alloc(&self) -> u32 {
        self.peer_alloc
    }

    fn in_flight(&self) -> u32 {
        self.sent.wrapping_sub(self.peer_forwarded)
    }
}

/// The guest's credit for sending to the device, and how much of it is in use.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ReceiveCredit {
    window: u32,
    received: u32,
    forwarded: u32,
    announced: u32,
}

impl ReceiveCredit {
    /// `window` bounds the bytes held for the host.
    pub(crate) fn new(window: u32) -> Self {
        ReceiveCredit { window, received: 0, forwarded: 0, announced: 0 }
    }

    /// Counts `n` bytes as received. Returns false, and counts none, if they exceed the guest's credit.
    #[must_use]
    pub(crate) fn count_received(&mut self, n: u32) -> bool {
        if n > self.window - self.held() {
            return false;
        }
        self.received = self.received.wrapping_add(n);
        true
    }

    /// Counts `n` of the held bytes, or all of them if there are fewer, as forwarded to the host.
    pub(crate) fn count_forwarded(&mut self, n: u32) {
        self.forwarded = self.forwarded.wrapping_add(n.min(self.held()));
    }

    /// Bytes received but not forwarded, at most the window.
    pub(crate) fn held(&self) -> u32 {
        self.received.wrapping_sub(self.forwarded)
    }

    /// Whether enough of the window became free since the last announcement to announce it. The threshold is a quarter:
    /// a guest that sends at full speed still has three quarters of the window while the update is on its way. Linux
    /// sends no more than its own receive buffer has room for, here `peer_alloc`, even if the window is larger.
    pub(crate) fn is_update_due(&self, peer_alloc: u32) -> bool {
        let used = self.window.min(peer_alloc);
        self.forwarded.wrapping_sub(self.announced) >= (used / 4).max(1)
    }

    /// Returns `buf_alloc` and `fwd_cnt` for an outgoing header, and counts them as announced.
    pub(crate) fn announce(&mut self) -> (u32, u32) {
        self.announced = self.forwarded;
        (self.window, self.forwarded)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn send_credit_survives_counter_wraparound() {
        let mut credit = SendCredit { peer_alloc: 100, peer_forwarded: u32::MAX - 10, sent: u32::MAX - 10 };
        assert_eq!(credit.available(), 100);
        credit.count_sent(60);
        assert_eq!(credit.available(), 40);
        credit.update(100, (u32::MAX - 10).wrapping_add(60));
        assert_eq!(credit.available(), 100);
    }

    #[test]
    fn send_credit_ignores_impossible_updates() {
        let mut credit = SendCredit::new();
        credit.update(100, 0);
        credit.count_sent(80);
        // (buf_alloc, fwd_cnt) of successive packets, and the credit after each
        for (alloc, forwarded, available) in [
            (100, 81, 20),       // more forwarded than was sent
            (100, u32::MAX, 20), // before the first byte
            (100, 50, 70),
            (100, 30, 70), // overtaken by the one before
            (10, 50, 0),   // shrunk below what is in flight
            (100, 80, 100),
            (u32::MAX, 80, u32::MAX),
        ] {
            credit.update(alloc, forwarded);
            assert_eq!(credit.available(), available, "after ({alloc}, {forwarded})");
        }
    }

    #[test]
    fn receive_credit_bounds_the_held_bytes() {
        let start = u32::MAX - 5;
        let mut credit = ReceiveCredit { window: 100, received: start, forwarded: start, announced: start };
        assert!(credit.count_received(100));
        assert!(!credit.count_received(1));
        assert_eq!(credit.held(), 100);
        credit.count_forwarded(24);
        assert!(!credit.is_update_due(100));
        credit.count_forwarded(1);
        assert!(credit.is_update_due(1000));
        assert_eq!(credit.announce(), (100, start.wrapping_add(25)));
        assert!(!credit.is_update_due(100));
        assert!(!credit.count_received(26));
        assert!(credit.count_received(25));
        credit.count_forwarded(u32::MAX);
        assert_eq!(credit.held(), 0);
    }

    #[test]
    fn a_guest_with_a_small_buffer_is_told_of_room_before_it_has_to_stop() {
        let mut credit = ReceiveCredit::new(1000);
        assert!(credit.count_received(10));
        // (forwarded in sum, the guest's buffer, whether an update is due)
        for (forwarded, peer_alloc, due) in [(0, 0, false), (1, 0, true), (1, 8, false), (2, 8, true), (9, 40, false)] {
            credit.count_forwarded(forwarded - credit.forwarded);
            assert_eq!(credit.is_update_due(peer_alloc), due, "{forwarded} of a guest with {peer_alloc}");
        }
    }
}
