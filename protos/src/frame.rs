//! Length-prefixed frames with one protobuf message each, for connections without TTRPC.
//!
//! A frame is a 32-bit big-endian length followed by as many bytes. The length is checked before the allocation because
//! the sender may be hostile.

use protobuf::Message;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// Largest message in a frame, bytes.
pub const MAX_FRAME: usize = 64 * 1024;

/// Why a frame could not be read or written. Display prints no cause; `source()` returns it.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// The length exceeds [`MAX_FRAME`].
    #[error("frame of {0} bytes is larger than {MAX_FRAME}")]
    TooLarge(usize),
    /// The bytes are not a message of the expected type.
    #[error("decode frame")]
    Decode(#[from] protobuf::Error),
    /// The connection failed, or ended before the end of the frame.
    #[error("transfer frame")]
    Io(#[from] std::io::Error),
}

/// Reads one frame, without a deadline.
pub async fn read<M: Message>(from: &mut (impl AsyncRead + Unpin)) -> Result<M, FrameError> {
    let len = from.read_u32().await? as usize;
    if len > MAX_FRAME {
        return Err(FrameError::TooLarge(len));
    }
    let mut bytes = vec![0; len];
    from.read_exact(&mut bytes).await?;
    Ok(M::parse_from_bytes(&bytes)?)
}

/// Writes and flushes one frame, without a deadline.
pub async fn write<M: Message>(to: &mut (impl AsyncWrite + Unpin), message: &M) -> Result<(), FrameError> {
    let bytes = message.write_to_bytes()?;
    if bytes.len() > MAX_FRAME {
        return Err(FrameError::TooLarge(bytes.len()));
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
    async fn a_written_frame_reads_back_unchanged() {
        let hello = Hello { version: "1.2.3".into(), protocol: 7, ..Default::default() };
        let mut wire = Vec::new();
        write(&mut wire, &hello).await.unwrap();
        assert_eq!(read::<Hello>(&mut wire.as_slice()).await.unwrap(), hello);
    }

    #[tokio::test]
    async fn an_oversized_length_is_rejected_before_the_payload_is_read() {
        let mut wire: &[u8] = &(MAX_FRAME as u32 + 1).to_be_bytes();
        assert!(matches!(read::<Hello>(&mut wire).await, Err(FrameError::TooLarge(n)) if n == MAX_FRAME + 1));
    }

    #[tokio::test]
    async fn a_truncated_frame_is_an_error() {
        let mut wire: &[u8] = &[0, 0, 0, 9, 1, 2];
        assert!(matches!(read::<Hello>(&mut wire).await, Err(FrameError::Io(_))));
    }
}
