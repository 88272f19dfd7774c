//! The token that proves a VM's identity: a JSON Web Token (RFC 7519), signed with the host's key. Pure.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use base64ct::{Base64UrlUnpadded, Encoding};
use serde_json::json;

use crate::metadata::key::Key;

/// The issuer that each token names.
pub(super) const ISSUER: &str = "husk";
/// The audience of a token whose requester names none.
pub(super) const AUDIENCE: &str = "husk";
/// Longest audience, bytes.
const AUDIENCE_MAX: usize = 255;

/// The VM that a token identifies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Identity {
    /// containerd's namespace.
    pub(crate) namespace: String,
    pub(crate) sandbox: String,
    /// The guest's CID, which is the same for all guests with a device of their own.
    pub(crate) cid: u32,
}

/// What makes a token different from others of its VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Occasion {
    /// Whom the VM will show the token.
    pub(super) audience: String,
    /// The host's name.
    pub(super) host: String,
    /// A random number.
    pub(super) id: [u8; 16],
    /// The time of issue.
    pub(super) now: SystemTime,
    /// How long the token is valid.
    pub(super) lifetime: Duration,
}

/// Checks the audience that a requester has named.
///
/// # Errors
///
/// What is allowed.
pub(super) fn audience(requested: &str) -> Result<&str, String> {
    let valid = requested.len() <= AUDIENCE_MAX && !requested.contains(char::is_control);
    match requested {
        "" => Ok(AUDIENCE),
        _ if valid => Ok(requested),
        _ => Err(format!("audience: must have at most {AUDIENCE_MAX} bytes and no control characters")),
    }
}

/// Issues a token. Its times are whole seconds; the lifetime is rounded up.
pub(super) fn issue(key: &Key, identity: &Identity, occasion: &Occasion) -> String {
    let Occasion { audience, host, id, now, lifetime } = occasion;
    let issued = now.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let seconds = lifetime.as_secs() + u64::from(lifetime.subsec_nanos() > 0);
    let claims = json!({
        "iss": ISSUER,
        "aud": audience,
        "jti": Base64UrlUnpadded::encode_string(id),
        "host": host,
        "sandbox": identity.sandbox,
        "namespace": identity.namespace,
        "cid": identity.cid,
        "iat": issued,
        "exp": issued.saturating_add(seconds),
    });
    let header = json!({"alg": "EdDSA", "typ": "JWT", "kid": key.public().id});
    compact(key, &header.to_string(), &claims.to_string())
}

/// The compact serialization of a JSON Web Signature (RFC 7515, section 7.1).
fn compact(key: &Key, header: &str, payload: &str) -> String {
    let encode = |bytes: &[u8]| Base64UrlUnpadded::encode_string(bytes);
    let signed = format!("{}.{}", encode(header.as_bytes()), encode(payload.as_bytes()));
    let signature = encode(&key.sign(signed.as_bytes()));
    format!("{signed}.{signature}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;

    #[test]
    fn the_signature_matches_the_standards_example() {
        // RFC 8037, A.4.
        assert_eq!(
            compact(&Key::example(), r#"{"alg":"EdDSA"}"#, "Example of Ed25519 signing"),
            "eyJhbGciOiJFZERTQSJ9.RXhhbXBsZSBvZiBFZDI1NTE5IHNpZ25pbmc.hgyY0il_MGCjP0JzlnLWG1PPOt7-09PGcvMg3AIbQR6dWbhijcNR4ki4iylGjg5BhVsPt9g7sVvpAr_MuM0KAg"
        );
    }

    #[test]
    fn an_audience_is_short_printable_text() {
        let longest = "x".repeat(AUDIENCE_MAX);
        for (requested, expected) in [("", "husk"), ("https://db.example", "https://db.example"), (&longest, &longest)]
        {
            assert_eq!(audience(requested), Ok(expected));
        }
        for invalid in ["a\nb", "\u{7f}", &format!("{longest}x")] {
            assert_eq!(
                audience(invalid).unwrap_err(),
                "audience: must have at most 255 bytes and no control characters"
            );
        }
    }

    #[test]
    fn a_token_names_its_vm_and_its_expiry() {
        let identity = Identity { namespace: "k8s.io".into(), sandbox: "pod-1".into(), cid: 3 };
        let table = [(300_000, 300), (1, 1), (1000, 1), (1001, 2), (u64::MAX, u64::MAX / 1000 + 1)];
        for (lifetime_ms, seconds) in table {
            let now = UNIX_EPOCH + Duration::from_millis(1_763_000_000_900);
            let lifetime = Duration::from_millis(lifetime_ms);
            let occasion = Occasion { audience: "db".into(), host: "node-7".into(), id: [7; 16], now, lifetime };
            let token = issue(&Key::example(), &identity, &occasion);
            let part = |n| Base64UrlUnpadded::decode_vec(token.split('.').nth(n).unwrap()).unwrap();
            let json = |n| serde_json::from_slice::<Value>(&part(n)).unwrap();
            let id = Key::example().public().id;
            assert_eq!(json(0), serde_json::json!({"alg": "EdDSA", "typ": "JWT", "kid": id}));
            let (iat, exp) = (1_763_000_000_u64, 1_763_000_000 + seconds);
            let expected = serde_json::json!({"iss": "husk", "aud": "db", "jti": "BwcHBwcHBwcHBwcHBwcHBw", "host": "node-7",
                "sandbox": "pod-1", "namespace": "k8s.io", "cid": 3, "iat": iat, "exp": exp});
            assert_eq!(json(1), expected);
        }
    }
}
