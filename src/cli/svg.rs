//! Drawing in SVG that stands alone: no script, no font, no other file.
//!
//! Owns the elements and the page they stand on. What they mean is the caller's.

/// The page, in pixels, and its margins.
pub(super) const WIDTH: f64 = 1200.0;
pub(super) const LEFT: f64 = 110.0;
pub(super) const RIGHT: f64 = 16.0;
/// Above a heading.
pub(super) const GAP: f64 = 34.0;

/// Text as it stands in XML.
pub(super) fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '&' => out.push_str("&amp;"),
            '"' => out.push_str("&quot;"),
            other => out.push(other),
        }
    }
    out
}

/// The drawing so far.
#[derive(Debug, Default)]
pub(super) struct Canvas {
    body: String,
    /// Everything above it is drawn on.
    pub(super) y: f64,
}

impl Canvas {
    pub(super) fn push(&mut self, element: &str) {
        self.body.push_str(element);
        self.body.push('\n');
    }

    /// Puts elements behind everything that is there.
    pub(super) fn push_behind(&mut self, elements: &str) {
        self.body.insert_str(0, elements);
    }

    pub(super) fn text(&mut self, x: f64, y: f64, anchor: &str, text: &str) {
        let text = escaped(text);
        self.push(&format!(
            "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\">{text}</text>"
        ));
    }

    pub(super) fn bar(
        &mut self,
        (x, y): (f64, f64),
        (width, height): (f64, f64),
        fill: &str,
        title: &str,
    ) {
        let title = escaped(title);
        self.push(&format!(
            "<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{height:.1}\" fill=\"{fill}\"><title>{title}</title></rect>"
        ));
    }

    pub(super) fn heading(&mut self, text: &str) {
        self.y += GAP;
        let y = self.y - 10.0;
        let text = escaped(text);
        self.push(&format!(
            "<text x=\"{LEFT}\" y=\"{y:.1}\" font-weight=\"bold\">{text}</text>"
        ));
    }

    /// What a colour means, at the right of the heading just written.
    pub(super) fn key(&mut self, entries: &[(&str, &str)]) {
        let y = self.y - 10.0;
        let mut x = WIDTH - RIGHT;
        for (name, colour) in entries.iter().rev() {
            self.text(x, y, "end", name);
            let characters = u32::try_from(name.chars().count()).unwrap_or(u32::MAX);
            x -= 7.0 * f64::from(characters) + 16.0;
            self.bar((x, y - 10.0), (11.0, 11.0), colour, name);
            x -= 14.0;
        }
    }

    /// The whole document.
    pub(super) fn finish(self) -> String {
        let height = self.y + 10.0;
        format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height:.0}\" width=\"{WIDTH}\" height=\"{height:.0}\" font-family=\"sans-serif\" font-size=\"12\" fill=\"#1f2328\">\n<rect width=\"{WIDTH}\" height=\"{height:.0}\" fill=\"#ffffff\"/>\n{}</svg>\n",
            self.body
        )
    }
}
