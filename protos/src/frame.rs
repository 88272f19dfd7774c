//! One protobuf message as a length-prefixed frame, for the connections that carry no TTRPC.
//!
//! A frame is a 32-bit big-endian length and that many bytes. The length is checked before anything is allocated, because the
//! sender may be hostile.

use protobuf::Message;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// Most bytes in a frame's message.
pub const MAX_FRAME: usize = 64 * 1024;

/// Why a frame could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The length says more than [`MAX_FRAME`].
    #[error("frame of {0} bytes is larger than {MAX_FRAME}")]
    TooLarge(usize),
    /// The bytes are not a message of the expected type.
    #[error("decode frame: {0}")]
    Decode(#[from] protobuf::Error),
    /// The connection failed or ended inside the frame.
    #[error("frame: {0}")]
    Io(#[from] std::io::Error),
}

/// Reads one frame. Has no deadline of its own.
pub async fn read<M: Message>(from: &mut (impl AsyncRead + Unpin)) -> Result<M, Error> {
    let len = from.read_u32().await? as usize;
    if len > MAX_FRAME {
        return Err(Error::TooLarge(len));
    }
    let mut bytes = vec![0; len];
    from.read_exact(&mut bytes).await?;
    Ok(M::parse_from_bytes(&bytes)?)
}

/// Writes one frame and flushes it. Has no deadline of its own.
pub async fn write<M: Message>(to: &mut (impl AsyncWrite + Unpin), message: &M) -> Result<(), Error> {
    let bytes = message.write_to_bytes()?;
    if bytes.len() > MAX_FRAME {
        return Err(Error::TooLarge(bytes.len()));
    }
    let mut frame = Vec::with_capacity(4 + bytes.len());
    frame.extend_from_slice(&(bytes.len() as u32).to_be_bytes());
    frame.extend_from_slice(&bytes);
    to.write_all(&frame).await?;
    to.flush().await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::system::Hello;

    #[tokio::test]
    async fn a_frame_comes_back_as_it_was() {
        let hello = Hello { version: "1.2.3".into(), protocol: 7, ..Default::default() };
        let mut wire = Vec::new();
        write(&mut wire, &hello).await.unwrap();
        assert_eq!(read::<Hello>(&mut wire.as_slice()).await.unwrap(), hello);
    }

    #[tokio::test]
    async fn a_length_beyond_the_limit_is_refused_before_its_bytes_come() {
        let mut wire: &[u8] = &(MAX_FRAME as u32 + 1).to_be_bytes();
        assert!(matches!(read::<Hello>(&mut wire).await, Err(Error::TooLarge(n)) if n == MAX_FRAME + 1));
    }

    #[tokio::test]
    async fn a_frame_cut_short_is_an_error() {
        let mut wire: &[u8] = &[0, 0, 0, 9, 1, 2];
        assert!(matches!(read::<Hello>(&mut wire).await, Err(Error::Io(_))));
    }
}
