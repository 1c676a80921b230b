//! Text that a POSIX shell reads.

/// One word that stands for `bytes` whatever they are: between single quotes all but the quote itself
/// is plain (POSIX.1, Shell Command Language, 2.2.2).
pub fn quoted(bytes: &[u8]) -> Vec<u8> {
    let mut word = vec![b'\''];
    for byte in bytes {
        match byte {
            b'\'' => word.extend_from_slice(br"'\''"),
            byte => word.push(*byte),
        }
    }
    word.push(b'\'');
    word
}
