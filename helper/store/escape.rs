//! Bytes of paths and arguments as text: what is UTF-8 without control characters stays as it is,
//! every other byte, and `%`, becomes `%XX`.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};

pub fn escape(raw: &OsStr) -> String {
    let mut text = String::new();
    for chunk in raw.as_bytes().utf8_chunks() {
        for c in chunk.valid().chars() {
            if c == '%' || c.is_control() {
                let mut bytes = [0; 4];
                push(&mut text, c.encode_utf8(&mut bytes).as_bytes());
            } else {
                text.push(c);
            }
        }
        push(&mut text, chunk.invalid());
    }
    text
}

fn push(text: &mut String, bytes: &[u8]) {
    for byte in bytes {
        text.push_str(&format!("%{byte:02X}"));
    }
}

/// The bytes again; `None` if a `%` is not followed by two hexadecimal digits.
pub fn unescape(text: &str) -> Option<OsString> {
    let mut raw = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        if byte == b'%' {
            let digit = |b: Option<u8>| char::from(b?).to_digit(16);
            let (high, low) = (digit(bytes.next())?, digit(bytes.next())?);
            raw.push(u8::try_from(high * 16 + low).ok()?);
        } else {
            raw.push(byte);
        }
    }
    Some(OsString::from_vec(raw))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn readable_where_it_can_be() {
        assert_eq!(
            escape(OsStr::new("rank-0/ckpt_é b.dmtcp")),
            "rank-0/ckpt_é b.dmtcp"
        );
        assert_eq!(escape(OsStr::from_bytes(b"a%\n\xff")), "a%25%0A%FF");
        assert_eq!(unescape("%"), None);
        assert_eq!(unescape("%zz"), None);
    }

    proptest! {
        #[test]
        fn comes_back(raw: Vec<u8>) {
            let raw = OsString::from_vec(raw);
            prop_assert_eq!(unescape(&escape(&raw)), Some(raw));
        }

        #[test]
        fn never_panics(text in "\\PC*") {
            let _ = unescape(&text);
        }
    }
}
