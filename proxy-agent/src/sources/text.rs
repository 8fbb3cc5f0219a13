//! Text as editors write it.

use std::borrow::Cow;

/// The text without a byte order mark, which may say that it is UTF-16.
pub(super) fn in_utf8(text: &[u8]) -> Cow<'_, [u8]> {
    let (rest, order): (_, fn([u8; 2]) -> u16) = match text {
        [0xef, 0xbb, 0xbf, rest @ ..] => return rest.into(),
        [0xff, 0xfe, rest @ ..] => (rest, u16::from_le_bytes),
        [0xfe, 0xff, rest @ ..] => (rest, u16::from_be_bytes),
        _ => return text.into(),
    };
    let (units, _) = rest.as_chunks::<2>();
    let units: Vec<u16> = units.iter().map(|unit| order(*unit)).collect();
    String::from_utf16_lossy(&units).into_bytes().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_byte_order_marks_say() {
        for (bytes, text) in [
            (&b"a"[..], "a"),
            (b"\xef\xbb\xbfa", "a"),
            (b"\xff\xfea\0b\0", "ab"),
            (b"\xfe\xff\0a\0b", "ab"),
            // Half of a character is none.
            (b"\xff\xfea\0b", "a"),
            (b"\xfe\xff\0", ""),
            (b"\xff\xfe\0\xd8", "\u{fffd}"),
        ] {
            assert_eq!(in_utf8(bytes), text.as_bytes(), "{bytes:x?}");
        }
    }
}
