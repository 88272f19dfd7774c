//! The header of a vsock packet (virtio 1.2, 5.10.6): decoding and encoding. Pure. `connection.rs` and `table.rs`
//! decide what a header means for a connection.

/// Size of an encoded header, bytes. Fields are little-endian, without padding.
pub const HEADER_LEN: usize = 44;
/// The only socket type that the device supports (virtio 1.2, 5.10.6: `VIRTIO_VSOCK_TYPE_STREAM`).
pub const TYPE_STREAM: u16 = 1;
/// The host's CID (virtio 1.2, 5.10.4; vsock(7): `VMADDR_CID_HOST`).
pub const HOST_CID: u64 = 2;

/// The operation of a packet (virtio 1.2, 5.10.6), with its number on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum Op {
    /// Requests a connection.
    Request = 1,
    /// Accepts a requested connection.
    Response = 2,
    /// Aborts a connection, or completes an orderly shutdown.
    Rst = 3,
    /// The sender stops sending, receiving, or both: see [`Shut`].
    Shutdown = 4,
    /// Carries payload.
    Rw = 5,
    /// Announces the sender's `buf_alloc` and `fwd_cnt`, which every packet carries.
    CreditUpdate = 6,
    /// Requests a credit update.
    CreditRequest = 7,
}

impl Op {
    fn from_wire(op: u16) -> Option<Self> {
        Some(match op {
            1 => Self::Request,
            2 => Self::Response,
            3 => Self::Rst,
            4 => Self::Shutdown,
            5 => Self::Rw,
            6 => Self::CreditUpdate,
            7 => Self::CreditRequest,
            _ => return None,
        })
    }
}

/// The directions that one side has closed: the flags of `VIRTIO_VSOCK_OP_SHUTDOWN`. A closed direction never reopens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Shut(u8);

impl Shut {
    /// Neither direction.
    pub const NONE: Shut = Shut(0);
    /// The sender of the packet receives no more.
    pub const RECEIVE: Shut = Shut(1);
    /// The sender of the packet sends no more.
    pub const SEND: Shut = Shut(2);
    /// Both directions: requests an orderly shutdown.
    pub const BOTH: Shut = Shut(3);

    /// Whether all of `other` is closed.
    pub fn has(self, other: Shut) -> bool {
        self.0 & other.0 == other.0
    }

    /// Closes `other` as well.
    pub fn add(&mut self, other: Shut) {
        self.0 |= other.0;
    }

    fn from_wire(flags: u32) -> Self {
        // Unknown bits are reserved for later versions of the protocol.
        Shut((flags & 3) as u8)
    }
}

/// A decoded header. `op` is `None` if the number is not in [`Op`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// CID of the sender.
    pub src_cid: u64,
    /// CID of the receiver.
    pub dst_cid: u64,
    /// Port of the sender.
    pub src_port: u32,
    /// Port of the receiver.
    pub dst_port: u32,
    /// Bytes of payload that follow.
    pub len: u32,
    /// Socket type. The device rejects all but [`TYPE_STREAM`].
    pub socket_type: u16,
    /// Operation.
    pub op: Option<Op>,
    /// Closed directions. Only [`Op::Shutdown`] uses them.
    pub shut: Shut,
    /// Size of the sender's receive buffer for this connection, bytes.
    pub buf_alloc: u32,
    /// Bytes that have left the sender's receive buffer so far, modulo 2^32.
    pub fwd_cnt: u32,
}

impl Header {
    /// Decodes a header.
    pub fn decode(bytes: &[u8; HEADER_LEN]) -> Self {
        let u16_at = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let u32_at = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let u64_at = |at: usize| u64::from(u32_at(at)) | u64::from(u32_at(at + 4)) << 32;
        Header {
            src_cid: u64_at(0),
            dst_cid: u64_at(8),
            src_port: u32_at(16),
            dst_port: u32_at(20),
            len: u32_at(24),
            socket_type: u16_at(28),
            op: Op::from_wire(u16_at(30)),
            shut: Shut::from_wire(u32_at(32)),
            buf_alloc: u32_at(36),
            fwd_cnt: u32_at(40),
        }
    }

    /// Encodes a header. Writes an `op` of `None` as 0, `VIRTIO_VSOCK_OP_INVALID`.
    pub fn encode(&self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        let mut put = |at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);
        put(0, &self.src_cid.to_le_bytes());
        put(8, &self.dst_cid.to_le_bytes());
        put(16, &self.src_port.to_le_bytes());
        put(20, &self.dst_port.to_le_bytes());
        put(24, &self.len.to_le_bytes());
        put(28, &self.socket_type.to_le_bytes());
        put(30, &self.op.map_or(0, |op| op as u16).to_le_bytes());
        put(32, &u32::from(self.shut.0).to_le_bytes());
        put(36, &self.buf_alloc.to_le_bytes());
        put(40, &self.fwd_cnt.to_le_bytes());
        bytes
    }

    /// The RST that answers this packet. It swaps the addresses and keeps the socket type, by which the sender finds
    /// the socket.
    pub fn rst_reply(&self) -> Self {
        Header {
            src_cid: self.dst_cid,
            dst_cid: self.src_cid,
            src_port: self.dst_port,
            dst_port: self.src_port,
            len: 0,
            socket_type: self.socket_type,
            op: Some(Op::Rst),
            shut: Shut::NONE,
            buf_alloc: 0,
            fwd_cnt: 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn header_fields_have_the_offsets_of_the_specification() {
        let mut bytes = [0; HEADER_LEN];
        for (at, byte) in bytes.iter_mut().enumerate() {
            *byte = at as u8;
        }
        bytes[30..32].copy_from_slice(&5u16.to_le_bytes());
        bytes[32..36].copy_from_slice(&2u32.to_le_bytes());
        let header = Header::decode(&bytes);
        assert_eq!(
            header,
            Header {
                src_cid: 0x0706_0504_0302_0100,
                dst_cid: 0x0f0e_0d0c_0b0a_0908,
                src_port: 0x1312_1110,
                dst_port: 0x1716_1514,
                len: 0x1b1a_1918,
                socket_type: 0x1d1c,
                op: Some(Op::Rw),
                shut: Shut::SEND,
                buf_alloc: 0x2726_2524,
                fwd_cnt: 0x2b2a_2928,
            }
        );
        assert_eq!(header.encode(), bytes);
    }

    #[test]
    fn an_unknown_operation_decodes_as_none() {
        for wire in [0u16, 8, 255, u16::MAX] {
            let mut bytes = [0; HEADER_LEN];
            bytes[30..32].copy_from_slice(&wire.to_le_bytes());
            assert_eq!(Header::decode(&bytes).op, None);
        }
    }
}
