//! The key that a host signs its tokens with: made at its first use, kept in a file that nobody else may read, and read anew for each token, so that
//! no process keeps it and a new one counts at once. No error names anything of its content.

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

/// A key in PEM takes some 120 bytes; comments before it are allowed.
const MOST_BYTES: u64 = 4096;
/// Permission bits that let others in.
const OTHERS: u32 = 0o077;

/// Why there is no key.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// A file operation failed.
    #[error("{what} {}: {source}", path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// There is something else at its place.
    #[error("metadata key {}: not a plain file of at most {MOST_BYTES} bytes", .0.display())]
    NoFile(PathBuf),
    /// Others could have read it.
    #[error(
        "metadata key {}: mode {mode:04o} lets others than its owner use it; nobody can tell who has: remove it for a new one, or chmod 600 it", path.display()
    )]
    Open {
        /// The file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// Another user can change it.
    #[error("metadata key {}: belongs to user {owner}, who is neither root nor the one who reads it", path.display())]
    Foreign {
        /// The file.
        path: PathBuf,
        /// Whose it is.
        owner: u32,
    },
    /// It holds something else.
    #[error("metadata key {}: no Ed25519 private key in PEM (PKCS#8), as `openssl genpkey -algorithm ed25519` makes it", .0.display())]
    Malformed(PathBuf),
    /// The system has no randomness for a new one.
    #[error("make the metadata key {}: no randomness: {source}", path.display())]
    Random {
        /// The file to be made.
        path: PathBuf,
        /// Why not.
        source: getrandom::Error,
    },
    /// A new one could not be written down as PEM.
    #[error("make the metadata key {}: encode it as PEM", .0.display())]
    Encode(PathBuf),
}

/// A host's key.
pub struct Key(SigningKey);

impl Key {
    /// Reads the key in the file `path`, which is made if it is not there. Of several who make it at once, all get the same.
    ///
    /// # Errors
    ///
    /// When it cannot be read or made, or is not to be trusted.
    pub fn read_or_make(path: &Path) -> Result<Self, KeyError> {
        if let Some(key) = Self::read(path)? {
            return Ok(key);
        }
        make(path)?;
        let gone = || KeyError::Io { what: "open", path: path.to_owned(), source: io::ErrorKind::NotFound.into() };
        Self::read(path)?.ok_or_else(gone)
    }

    fn read(path: &Path) -> Result<Option<Self>, KeyError> {
        // Without O_NONBLOCK, a fifo in its place would be waited for.
        let flags = libc::O_NONBLOCK | libc::O_NOCTTY;
        let file = match OpenOptions::new().read(true).custom_flags(flags).open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(failed("open", path)(error)),
        };
        let facts = file.metadata().map_err(failed("look at", path))?;
        if !facts.is_file() || facts.len() > MOST_BYTES {
            return Err(KeyError::NoFile(path.to_owned()));
        }
        let (mode, owner) = (facts.mode() & 0o7777, facts.uid());
        if mode & OTHERS != 0 {
            return Err(KeyError::Open { path: path.to_owned(), mode });
        }
        if owner != 0 && owner != nix::unistd::geteuid().as_raw() {
            return Err(KeyError::Foreign { path: path.to_owned(), owner });
        }
        // With room for all of it from the start: growing would leave pieces behind in freed memory.
        let mut text = Zeroizing::new(Vec::with_capacity(MOST_BYTES as usize));
        file.take(MOST_BYTES).read_to_end(&mut text).map_err(failed("read", path))?;
        let malformed = || KeyError::Malformed(path.to_owned());
        let text = std::str::from_utf8(&text).map_err(|_| malformed())?;
        SigningKey::from_pkcs8_pem(text).map(|key| Some(Self(key))).map_err(|_| malformed())
    }

    /// Signs (RFC 8032, Ed25519).
    pub fn sign(&self, bytes: &[u8]) -> [u8; 64] {
        self.0.sign(bytes).to_bytes()
    }

    /// What a verifier needs.
    pub fn public(&self) -> Public {
        let bytes = self.0.verifying_key().to_bytes();
        let x = Base64UrlUnpadded::encode_string(&bytes);
        // The members in this order and nothing between them: RFC 7638, 3.
        let canonical = format!(r#"{{"crv":"Ed25519","kty":"OKP","x":"{x}"}}"#);
        Public { bytes, id: Base64UrlUnpadded::encode_string(&Sha256::digest(canonical)), x }
    }
}

/// The public half of a host's key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Public {
    /// The key itself.
    pub bytes: [u8; 32],
    /// Its thumbprint (RFC 7638), by which tokens name it.
    pub id: String,
    x: String,
}

impl Public {
    /// As a JSON Web Key (RFC 8037, 2).
    pub fn jwk(&self) -> Value {
        json!({"kty": "OKP", "crv": "Ed25519", "x": self.x, "kid": self.id, "alg": "EdDSA", "use": "sig"})
    }

    /// As PEM of a SubjectPublicKeyInfo (RFC 8410), ending with a line's end.
    ///
    /// # Errors
    ///
    /// When it cannot be encoded.
    pub fn pem(&self) -> Result<String, ed25519_dalek::pkcs8::spki::Error> {
        ed25519_dalek::pkcs8::PublicKeyBytes(self.bytes).to_public_key_pem(LineEnding::LF)
    }
}

/// Makes the file. It gets its name when all of it is there; if another has the name by then, that one stays.
fn make(path: &Path) -> Result<(), KeyError> {
    let folder = path.parent().unwrap_or_else(|| Path::new("/"));
    DirBuilder::new().recursive(true).mode(0o755).create(folder).map_err(failed("create", folder))?;
    let random = |source| KeyError::Random { path: path.to_owned(), source };
    let mut seed = Zeroizing::new([0; 32]);
    getrandom::fill(&mut *seed).map_err(random)?;
    // Without the public key: only some readers of PKCS#8 take version 2, which can hold it.
    let pem = KeypairBytes { secret_key: *seed, public_key: None }.to_pkcs8_pem(LineEnding::LF);
    let pem = pem.map_err(|_| KeyError::Encode(path.to_owned()))?;

    let mut suffix = [0; 8];
    getrandom::fill(&mut suffix).map_err(random)?;
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let new = folder.join(format!(".{name}.{:016x}", u64::from_ne_bytes(suffix)));
    let made = write_new(&new, pem.as_bytes()).and_then(|()| match fs::hard_link(&new, path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        linked => linked.map_err(failed("make", path)),
    });
    let removed = fs::remove_file(&new).map_err(failed("remove", &new));
    made?;
    removed?;
    // Tokens must not outlive their key in a crash of the host.
    File::open(folder).and_then(|folder| folder.sync_all()).map_err(failed("write back", folder))
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
pub(super) mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;
    use std::sync::Barrier;

    /// The example of RFC 8037, A.1 and A.2.
    const D: &str = "nWGxne_9WmC6hEr0kuwsxERJxWl7MmkZcDusAxyuf2A";
    const X: &str = "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo";

    pub(in crate::metadata) fn example() -> Key {
        let seed: [u8; 32] = Base64UrlUnpadded::decode_vec(D).unwrap().try_into().unwrap();
        Key(SigningKey::from_bytes(&seed))
    }

    #[test]
    fn what_a_verifier_needs_is_as_the_standards_write_it() {
        let public = example().public();
        // RFC 8037, A.2 and A.3; the PEM as openssl prints it of the same key.
        assert_eq!((public.jwk()["x"].as_str(), public.jwk()["kty"].as_str()), (Some(X), Some("OKP")));
        assert_eq!(public.id, "kPrK_qmxVWaYVA9wwBF6Iuo3vVzz7TxHCTwXBygrS4k");
        assert_eq!(
            public.pem().unwrap(),
            "-----BEGIN PUBLIC KEY-----\nMCowBQYDK2VwAyEA11qYAYKxCrfVS/7TyWQHOg7hcvPapiMlrwIaaPcHURo=\n-----END PUBLIC KEY-----\n"
        );
    }

    #[test]
    fn a_key_is_made_once_for_its_owner_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("etc/husk/metadata.key");
        let first = Key::read_or_make(&path).unwrap().public();
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o7777, 0o600);
        assert_eq!(Key::read_or_make(&path).unwrap().public(), first);
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1, "something is left beside it");
    }

    #[test]
    fn all_who_make_it_at_once_get_the_same() {
        for _ in 0..20 {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("metadata.key");
            let start = Barrier::new(8);
            let keys: Vec<Public> = std::thread::scope(|scope| {
                let make = || {
                    start.wait();
                    Key::read_or_make(&path).unwrap().public()
                };
                let threads: Vec<_> = (0..8).map(|_| scope.spawn(make)).collect();
                threads.into_iter().map(|thread| thread.join().unwrap()).collect()
            });
            assert!(keys.iter().all(|key| *key == keys[0]), "{keys:?}");
            assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "something is left beside it");
        }
    }

    #[test]
    fn what_is_not_to_be_trusted_is_refused_without_a_word_of_it() {
        // Made by `openssl genpkey -algorithm ed25519`, and good.
        let good = "-----BEGIN PRIVATE KEY-----\nMC4CAQAwBQYDK2VwBCIEINTuctv5E1hK1bbY8fdp+K06/nwoy/HU++CXqI9EdVhC\n-----END PRIVATE KEY-----\n";
        let cut = &good[..70];
        let long = format!("{good}{}", "x".repeat(5000));
        let table = [
            (good, 0o600, None),
            (good, 0o400, None),
            (good, 0o640, Some("mode 0640 lets others")),
            (good, 0o604, Some("mode 0604 lets others")),
            (good, 0o620, Some("mode 0620 lets others")),
            (cut, 0o600, Some("no Ed25519 private key")),
            ("", 0o600, Some("no Ed25519 private key")),
            (&long, 0o600, Some("not a plain file of at most 4096 bytes")),
        ];
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metadata.key");
        for (content, mode, expected) in table {
            fs::write(&path, content).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            match (Key::read_or_make(&path), expected) {
                (Ok(_), None) => {}
                (Err(error), Some(expected)) => {
                    let text = format!("{error} {error:?}");
                    assert!(text.contains(expected) && text.contains(path.to_str().unwrap()), "{mode:o}: {text}");
                    assert!(!text.contains("MC4C"), "{text}");
                }
                (other, _) => panic!("{mode:o} {content:?}: {:?}", other.err()),
            }
            assert_eq!(fs::read_to_string(&path).unwrap(), content, "it was touched");
        }
    }

    #[test]
    fn what_is_no_file_is_refused_and_not_waited_for() {
        let folder = tempfile::tempdir().unwrap();
        let fifo = folder.path().join("fifo");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
        for path in [folder.path(), &fifo] {
            let error = Key::read_or_make(path).err().unwrap().to_string();
            assert!(error.contains("not a plain file"), "{error}");
        }
    }

    #[test]
    fn another_users_key_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metadata.key");
        Key::read_or_make(&path).unwrap();
        std::os::unix::fs::chown(&path, Some(12), None).unwrap();
        let error = Key::read_or_make(&path).err().unwrap().to_string();
        assert!(error.ends_with("belongs to user 12, who is neither root nor the one who reads it"), "{error}");
    }
}
