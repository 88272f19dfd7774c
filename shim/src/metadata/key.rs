//! The host's key, which signs tokens. husk creates it at its first use, in a file that only its owner may read. The
//! key is read for each token: no process keeps it, and a new key takes effect at once. Errors show none of the file's
//! content.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use base64ct::{Base64UrlUnpadded, Encoding};
use ed25519_dalek::pkcs8::spki::der::pem::LineEnding;
use ed25519_dalek::pkcs8::{DecodePrivateKey, EncodePrivateKey, EncodePublicKey, KeypairBytes};
use ed25519_dalek::{Signer, SigningKey};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use zeroize::Zeroizing;

/// Size limit of the file. A key in PEM takes some 120 bytes; comments before it are allowed.
const MAX_BYTES: u64 = 4096;
/// Permission bits of group and others.
const OTHERS: u32 = 0o077;

/// Why the key cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// A file operation failed.
    #[error("{what} {}", path.display())]
    Io {
        /// The attempted operation.
        what: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// Not a file, or too large.
    #[error("metadata key {}: not a regular file of at most {MAX_BYTES} bytes", .0.display())]
    NotAFile(PathBuf),
    /// Others may have read the key.
    #[error(
        "metadata key {}: mode {mode:04o} gives other users access, so the key may be known: remove the file for a new key, or run chmod 600 on it", path.display()
    )]
    Exposed {
        /// The file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// Another user can change the key.
    #[error("metadata key {}: owned by user {owner}, who is neither root nor the current user", path.display())]
    Foreign {
        /// The file.
        path: PathBuf,
        /// Its owner.
        owner: u32,
    },
    /// The file contains something else.
    #[error("metadata key {}: not an Ed25519 private key in PEM (PKCS#8), the format of `openssl genpkey -algorithm ed25519`", .0.display())]
    Malformed(PathBuf),
    /// The system provides no random bytes for a new key.
    #[error("read random bytes for the metadata key {}", path.display())]
    Random {
        /// The key's file.
        path: PathBuf,
        /// The cause.
        source: getrandom::Error,
    },
    /// A new key cannot be encoded.
    #[error("encode the metadata key {} as PEM", .0.display())]
    Encode(PathBuf),
}

/// A host's key.
pub struct Key(SigningKey);

impl Key {
    /// Reads the key in the file `path`, and creates the file if it does not exist. Concurrent calls get the same key.
    ///
    /// # Errors
    ///
    /// When the key cannot be read or created, or cannot be trusted.
    pub fn read_or_create(path: &Path) -> Result<Self, KeyError> {
        if let Some(key) = Self::read(path)? {
            return Ok(key);
        }
        create(path)?;
        let gone = || KeyError::Io { what: "open", path: path.to_owned(), source: io::ErrorKind::NotFound.into() };
        Self::read(path)?.ok_or_else(gone)
    }

    fn read(path: &Path) -> Result<Option<Self>, KeyError> {
        // O_NONBLOCK: opening a fifo does not block.
        let flags = libc::O_NONBLOCK | libc::O_NOCTTY;
        let file = match OpenOptions::new().read(true).custom_flags(flags).open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(failed("open", path)(error)),
        };
        let metadata = file.metadata().map_err(failed("stat", path))?;
        if !metadata.is_file() || metadata.len() > MAX_BYTES {
            return Err(KeyError::NotAFile(path.to_owned()));
        }
        let (mode, owner) = (metadata.mode() & 0o7777, metadata.uid());
        if mode & OTHERS != 0 {
            return Err(KeyError::Exposed { path: path.to_owned(), mode });
        }
        if owner != 0 && owner != nix::unistd::geteuid().as_raw() {
            return Err(KeyError::Foreign { path: path.to_owned(), owner });
        }
        // Allocated in full size: growing would leave copies of the key in freed memory.
        let mut text = Zeroizing::new(Vec::with_capacity(MAX_BYTES as usize));
        file.take(MAX_BYTES).read_to_end(&mut text).map_err(failed("read", path))?;
        let malformed = || KeyError::Malformed(path.to_owned());
        let text = std::str::from_utf8(&text).map_err(|_| malformed())?;
        SigningKey::from_pkcs8_pem(text).map(|key| Some(Self(key))).map_err(|_| malformed())
    }

    /// Signs `bytes` (Ed25519, RFC 8032).
    pub(super) fn sign(&self, bytes: &[u8]) -> [u8; 64] {
        self.0.sign(bytes).to_bytes()
    }

    /// The public key, for verifiers.
    pub fn public(&self) -> PublicKey {
        let bytes = self.0.verifying_key().to_bytes();
        let x = Base64UrlUnpadded::encode_string(&bytes);
        // RFC 7638, section 3, prescribes the order of the members, without white space.
        let canonical = format!(r#"{{"crv":"Ed25519","kty":"OKP","x":"{x}"}}"#);
        PublicKey { bytes, id: Base64UrlUnpadded::encode_string(&Sha256::digest(canonical)), x }
    }
}

/// The public half of a host's key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PublicKey {
    pub(super) bytes: [u8; 32],
    /// The thumbprint (RFC 7638), which tokens contain as `kid`.
    pub(super) id: String,
    x: String,
}

impl PublicKey {
    /// A JSON Web Key (RFC 8037, section 2).
    pub fn jwk(&self) -> Value {
        json!({"kty": "OKP", "crv": "Ed25519", "x": self.x, "kid": self.id, "alg": "EdDSA", "use": "sig"})
    }

    /// A SubjectPublicKeyInfo (RFC 8410) in PEM, with a final newline.
    ///
    /// # Errors
    ///
    /// When the key cannot be encoded.
    pub fn pem(&self) -> Result<String, ed25519_dalek::pkcs8::spki::Error> {
        ed25519_dalek::pkcs8::PublicKeyBytes(self.bytes).to_public_key_pem(LineEnding::LF)
    }
}

/// Creates the key's file. The complete file is linked to its name; if another process has created the file meanwhile,
/// that one stays.
fn create(path: &Path) -> Result<(), KeyError> {
    let folder = path.parent().unwrap_or_else(|| Path::new("/"));
    DirBuilder::new().recursive(true).mode(0o755).create(folder).map_err(failed("create", folder))?;
    let random = |source| KeyError::Random { path: path.to_owned(), source };
    let mut seed = Zeroizing::new([0; 32]);
    getrandom::fill(&mut *seed).map_err(random)?;
    // Without the public key: it requires version 2 of PKCS#8, which not every reader supports.
    let pem = KeypairBytes { secret_key: *seed, public_key: None }.to_pkcs8_pem(LineEnding::LF);
    let pem = pem.map_err(|_| KeyError::Encode(path.to_owned()))?;

    let mut suffix = [0; 8];
    getrandom::fill(&mut suffix).map_err(random)?;
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let new = folder.join(format!(".{name}.{:016x}", u64::from_ne_bytes(suffix)));
    let created = write_new(&new, pem.as_bytes()).and_then(|()| match fs::hard_link(&new, path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        linked => linked.map_err(failed("create", path)),
    });
    let removed = fs::remove_file(&new).map_err(failed("remove", &new));
    created?;
    removed?;
    // A crash of the host must not lose a key that has signed tokens.
    File::open(folder).and_then(|folder| folder.sync_all()).map_err(failed("sync", folder))
}

fn write_new(path: &Path, content: &[u8]) -> Result<(), KeyError> {
    let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
    let mut file = file.map_err(failed("create", path))?;
    file.write_all(content).and_then(|()| file.sync_all()).map_err(failed("write", path))
}

fn failed(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> KeyError {
    let path = path.to_owned();
    move |source| KeyError::Io { what, path, source }
}

#[cfg(test)]
impl Key {
    /// The example of RFC 8037, A.1.
    pub(super) fn example() -> Self {
        let seed = Base64UrlUnpadded::decode_vec("nWGxne_9WmC6hEr0kuwsxERJxWl7MmkZcDusAxyuf2A").unwrap();
        Self(SigningKey::from_bytes(&seed.try_into().unwrap()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;
    use std::sync::Barrier;

    /// The example of RFC 8037, A.2.
    const X: &str = "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo";

    #[test]
    fn the_public_key_has_the_standard_formats() {
        let public = Key::example().public();
        // RFC 8037, A.2 and A.3, and openssl's PEM of the same key.
        assert_eq!((public.jwk()["x"].as_str(), public.jwk()["kty"].as_str()), (Some(X), Some("OKP")));
        assert_eq!(public.id, "kPrK_qmxVWaYVA9wwBF6Iuo3vVzz7TxHCTwXBygrS4k");
        assert_eq!(
            public.pem().unwrap(),
            "-----BEGIN PUBLIC KEY-----\nMCowBQYDK2VwAyEA11qYAYKxCrfVS/7TyWQHOg7hcvPapiMlrwIaaPcHURo=\n-----END PUBLIC KEY-----\n"
        );
    }

    #[test]
    fn a_key_is_created_once_and_only_its_owner_can_read_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("etc/husk/metadata.key");
        let first = Key::read_or_create(&path).unwrap().public();
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o7777, 0o600);
        assert_eq!(Key::read_or_create(&path).unwrap().public(), first);
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1, "a temporary file is left");
    }

    #[test]
    fn concurrent_creators_get_the_same_key() {
        for _ in 0..20 {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("metadata.key");
            let start = Barrier::new(8);
            let keys: Vec<PublicKey> = std::thread::scope(|scope| {
                let create = || {
                    start.wait();
                    Key::read_or_create(&path).unwrap().public()
                };
                let threads: Vec<_> = (0..8).map(|_| scope.spawn(create)).collect();
                threads.into_iter().map(|thread| thread.join().unwrap()).collect()
            });
            assert!(keys.iter().all(|key| *key == keys[0]), "{keys:?}");
            assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "a temporary file is left");
        }
    }

    #[test]
    fn an_untrusted_file_is_rejected_without_showing_its_content() {
        // Created by `openssl genpkey -algorithm ed25519`.
        let valid = "-----BEGIN PRIVATE KEY-----\nMC4CAQAwBQYDK2VwBCIEINTuctv5E1hK1bbY8fdp+K06/nwoy/HU++CXqI9EdVhC\n-----END PRIVATE KEY-----\n";
        let cut = &valid[..70];
        let long = format!("{valid}{}", "x".repeat(5000));
        let table = [
            (valid, 0o600, None),
            (valid, 0o400, None),
            (valid, 0o640, Some("mode 0640 gives other users access")),
            (valid, 0o604, Some("mode 0604 gives other users access")),
            (valid, 0o620, Some("mode 0620 gives other users access")),
            (cut, 0o600, Some("not an Ed25519 private key")),
            ("", 0o600, Some("not an Ed25519 private key")),
            (&long, 0o600, Some("not a regular file of at most 4096 bytes")),
        ];
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metadata.key");
        for (content, mode, expected) in table {
            fs::write(&path, content).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            match (Key::read_or_create(&path), expected) {
                (Ok(_), None) => {}
                (Err(error), Some(expected)) => {
                    let text = format!("{error} {error:?}");
                    assert!(text.contains(expected) && text.contains(path.to_str().unwrap()), "{mode:o}: {text}");
                    assert!(!text.contains("MC4C"), "{text}");
                }
                (other, _) => panic!("{mode:o} {content:?}: {:?}", other.err()),
            }
            assert_eq!(fs::read_to_string(&path).unwrap(), content, "the file was changed");
        }
    }

    #[test]
    fn a_folder_or_fifo_is_rejected_without_blocking() {
        let folder = tempfile::tempdir().unwrap();
        let fifo = folder.path().join("fifo");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
        for path in [folder.path(), &fifo] {
            let error = Key::read_or_create(path).err().unwrap().to_string();
            assert!(error.contains("not a regular file"), "{error}");
        }
    }

    #[test]
    fn another_users_key_is_rejected() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metadata.key");
        Key::read_or_create(&path).unwrap();
        std::os::unix::fs::chown(&path, Some(12), None).unwrap();
        let error = Key::read_or_create(&path).err().unwrap().to_string();
        assert!(error.ends_with("owned by user 12, who is neither root nor the current user"), "{error}");
    }
}
