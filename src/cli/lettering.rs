//! Letters in pictures: a font of 8x8 px.

use font8x8::UnicodeFonts as _;
use image::{Rgb, RgbImage};

/// Side of a letter, px.
pub(super) const LETTER: u32 = 8;

/// Writes text with its upper left corner at a place; what the font lacks stays blank.
pub(super) fn write(sheet: &mut RgbImage, (x, y): (u32, u32), text: &str, colour: Rgb<u8>) {
    for (i, letter) in text.chars().enumerate() {
        let rows = font8x8::BASIC_FONTS.get(letter).unwrap_or_default();
        for (row, bits) in (0..).zip(rows) {
            for column in (0..LETTER).filter(|column| bits >> column & 1 == 1) {
                let place = (x + i as u32 * LETTER + column, y + row);
                if place.0 < sheet.width() && place.1 < sheet.height() {
                    sheet.put_pixel(place.0, place.1, colour);
                }
            }
        }
    }
}

/// Lines of at most `width` letters, broken at blanks where there are any.
#[cfg(feature = "demo")]
pub(super) fn wrapped(text: &str, width: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in text.split_whitespace() {
        let letters = word.chars().collect::<Vec<_>>();
        for (i, piece) in letters.chunks(width.max(1)).enumerate() {
            let piece = piece.iter().collect::<String>();
            let here = lines.last().map_or(0, |line| line.chars().count());
            let fits = here == 0 || i == 0 && here + 1 + piece.chars().count() <= width;
            match lines.last_mut().filter(|_| fits) {
                Some(line) => {
                    if here > 0 {
                        line.push(' ');
                    }
                    line.push_str(&piece);
                }
                None => lines.push(piece),
            }
        }
    }
    lines
}

#[cfg(all(test, feature = "demo"))]
mod tests {
    use super::*;

    #[test]
    fn lines_break_at_blanks_and_long_words_anywhere() {
        assert_eq!(wrapped("a red cap", 5), ["a red", "cap"]);
        assert_eq!(wrapped("abcdefg hi", 3), ["abc", "def", "g", "hi"]);
        assert_eq!(wrapped("", 5), [""]);
    }
}
