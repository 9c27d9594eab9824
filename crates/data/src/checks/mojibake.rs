//! UTF-8 that was read as Windows-1252 and written again: `Ã©` for `é`, `â€™` for `’`.

/// What 0x80 to 0x9f are in Windows-1252; five of them are nothing.
const HIGH: [char; 32] = [
    '€', '\u{81}', '‚', 'ƒ', '„', '…', '†', '‡', 'ˆ', '‰', 'Š', '‹', 'Œ', '\u{8d}', 'Ž', '\u{8f}', '\u{90}',
    '‘', '’', '“', '”', '•', '–', '—', '˜', '™', 'š', '›', 'œ', '\u{9d}', 'ž', 'Ÿ',
];

/// The first piece of `text` that is mojibake, or the character that stands for what could not be read.
pub(super) fn find(text: &str) -> Option<String> {
    if text.contains('\u{fffd}') {
        return Some('\u{fffd}'.to_string());
    }
    let mut run = String::new();
    for character in text.chars().chain(['\n']) {
        if byte(character).is_some() {
            run.push(character);
            continue;
        }
        let bytes: Vec<u8> = run.chars().filter_map(byte).collect();
        // Characters that were bytes of UTF-8 are UTF-8 again; text of its own hardly ever is.
        if bytes.len() > 1 && std::str::from_utf8(&bytes).is_ok() {
            return Some(run);
        }
        run.clear();
    }
    None
}

/// The byte that is not ASCII and that Windows-1252 reads as `character`.
fn byte(character: char) -> Option<u8> {
    match u8::try_from(u32::from(character)) {
        Ok(byte @ 0xa0..) => Some(byte),
        _ => HIGH.iter().position(|&high| high == character).map(|place| 0x80 + place as u8),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_told_from_what_it_was_read_as() {
        for text in ["CafÃ© au lait", "itâ€™s", "20 Â°C", "ï¿½", "a\u{fffd}b", "Ã¼", "ðŸ˜€!"]
        {
            assert!(find(text).is_some(), "{text}");
        }
        for text in [
            "Café",
            "it’s “so”…",
            "20 °C",
            "naïve — déjà vu",
            "ÄÖÜ",
            "日本語",
            "Привет",
            "😀",
            "«Á»",
            "£€5",
            "",
        ] {
            assert_eq!(find(text), None, "{text}");
        }
        assert_eq!(find("x itâ€™s").as_deref(), Some("â€™"));
    }
}
