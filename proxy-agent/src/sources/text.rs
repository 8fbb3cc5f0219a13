//! Decoding of text files: UTF-8, with or without a byte order mark, and UTF-16 with one.

use std::borrow::Cow;

/// Returns the text as UTF-8 without its byte order mark. Text is UTF-16 if its byte order mark says so.
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
            // An incomplete last unit of UTF-16 is dropped.
            (b"\xff\xfea\0b", "a"),
            (b"\xfe\xff\0", ""),
            (b"\xff\xfe\0\xd8", "\u{fffd}"),
        ] {
            assert_eq!(in_utf8(bytes), text.as_bytes(), "{bytes:x?}");
        }
    }
}
