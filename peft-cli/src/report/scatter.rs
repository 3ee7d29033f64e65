//! Points on two measured axes, as inline SVG with labels in HTML, in the manner of [`super::chart`].

use super::html::escape;
use super::scale::{Axis, Unit};
use super::series::Point;
use std::fmt::Write;

/// Units of the drawing's own coordinates in each direction.
const SIZE: f64 = 1000.0;

/// What a letter, a line of text and the space before a name take of a drawing of usual size.
const LETTER: f64 = 0.0155;
const LINE: f64 = 0.056;
const SPACE: f64 = 0.016;

/// How many lines above or below its point a name may stand.
const MAX_LINES: i32 = 12;

/// A named point, or several joined ones.
#[derive(Debug, Clone)]
pub struct Dot {
    /// Its name.
    pub label: String,
    /// The number of its colour in the style sheet, from 1.
    pub colour: usize,
    /// Where it is.
    pub points: Vec<Point>,
}

/// A chart of named points.
#[derive(Debug, Clone)]
pub struct Scatter {
    /// Its name.
    pub title: &'static str,
    /// What the vertical axis counts, in words.
    pub caption: &'static str,
    /// What the horizontal axis counts, in words and unit, and whether a wide range may be logarithmic.
    pub x: (&'static str, Unit, bool),
    /// The points.
    pub dots: Vec<Dot>,
}

impl Scatter {
    /// The chart as HTML; `None` where there is no finite point.
    pub fn html(&self) -> Option<String> {
        let finite = |point: &&Point| point.0.is_finite() && point.1.is_finite();
        let all = || self.dots.iter().flat_map(|dot| &dot.points).filter(finite);
        let ends = |value: fn(&Point) -> f64| {
            Some((all().map(value).reduce(f64::min)?, all().map(value).reduce(f64::max)?))
        };
        let ((left, right), (low, high)) = (ends(|point| point.0)?, ends(|point| point.1)?);
        let (name, unit, log) = self.x;
        let x = Axis::around(left, right, unit, false, log);
        let y = Axis::around(low, high, Unit::Number, false, true);

        let mut out = String::new();
        let scale = if x.log { ", logarithmic" } else { "" };
        let _ = write!(
            out,
            "<figure class=\"chart scatter\">\n<figcaption><h3>{}</h3><span>{} against {}{scale}</span></figcaption>\n",
            escape(self.title),
            escape(self.caption),
            escape(name)
        );
        let labels: Vec<String> = y.ticks.iter().map(|tick| y.label(*tick)).collect();
        let gutter = labels.iter().map(|label| label.chars().count()).max().unwrap_or(1);
        let _ = write!(out, "<div class=\"plot\" style=\"--gutter:{gutter}ch\">\n<div class=\"y\">");
        for (tick, label) in y.ticks.iter().zip(&labels) {
            let _ = write!(out, "<span style=\"bottom:{:.2}%\">{label}</span>", 100.0 * y.place(*tick));
        }
        out.push_str("</div>\n<div class=\"area\">");
        let labels: Vec<&str> = self.dots.iter().map(|dot| dot.label.as_str()).collect();
        let _ = write!(
            out,
            "<svg viewBox=\"0 0 {SIZE} {SIZE}\" preserveAspectRatio=\"none\" role=\"img\" aria-label=\"{}\">",
            escape(&format!("{}: {}", self.title, labels.join(", ")))
        );
        let grid: String =
            y.ticks.iter().map(|tick| format!("M0 {:.1}H{SIZE}", SIZE * (1.0 - y.place(*tick)))).collect();
        let _ = write!(out, "<path class=\"grid\" d=\"{grid}\"/>");
        let mut names = Names::default();
        let mut words = String::new();
        for dot in &self.dots {
            names
                .points
                .extend(dot.points.iter().filter(finite).map(|(px, py)| (x.place(*px), y.place(*py))));
        }
        for dot in &self.dots {
            let mut points: Vec<Point> = dot.points.iter().filter(finite).copied().collect();
            points.sort_by(|a, b| a.0.total_cmp(&b.0));
            let placed: Vec<Point> = points.iter().map(|(px, py)| (x.place(*px), y.place(*py))).collect();
            let at = |(px, py): &Point| format!("{:.1} {:.1}", SIZE * px, SIZE * (1.0 - py));
            let line: Vec<String> = placed.iter().map(at).collect();
            if line.len() > 1 {
                let _ = write!(out, "<path class=\"joined c{}\" d=\"M{}\"/>", dot.colour, line.join("L"));
            }
            // A line of no length with round ends is a dot that does not stretch with the drawing.
            let dots: String = line.iter().map(|place| format!("M{place}h0")).collect();
            let _ = write!(out, "<path class=\"dots c{}\" d=\"{dots}\"/>", dot.colour);
            if let Some(point) = placed.last() {
                let (height, is_left) = names.place(*point, dot.label.chars().count());
                if height != point.1 {
                    let end = (point.0 + if is_left { -SPACE } else { SPACE }, height);
                    let _ = write!(
                        out,
                        "<path class=\"leader c{}\" d=\"M{}L{}\"/>",
                        dot.colour,
                        at(point),
                        at(&end)
                    );
                }
                let side = if is_left { " class=\"left\"" } else { "" };
                let _ = write!(
                    words,
                    "<b{side} style=\"left:{:.2}%;bottom:{:.2}%\">{}</b>",
                    100.0 * point.0,
                    100.0 * height,
                    escape(&dot.label)
                );
            }
        }
        let _ = write!(out, "</svg>{words}</div>\n<div class=\"x\">");
        for tick in &x.ticks {
            let _ =
                write!(out, "<span style=\"left:{:.2}%\">{}</span>", 100.0 * x.place(*tick), x.label(*tick));
        }
        out.push_str("</div>\n</div>\n</figure>\n");
        Some(out)
    }
}

/// Names that have their places, in shares of the drawing from its lower left corner.
#[derive(Default)]
struct Names {
    points: Vec<Point>,
    /// Left, right and middle height.
    boxes: Vec<(f64, f64, f64)>,
}

impl Names {
    /// The height of a name of so many letters and whether it stands left of its point: the nearest place where it
    /// covers no other name and no point.
    fn place(&mut self, point: Point, letters: usize) -> (f64, bool) {
        let width = LETTER * letters as f64;
        let span = |is_left: bool| match is_left {
            true => (point.0 - SPACE - width, point.0 - SPACE),
            false => (point.0 + SPACE, point.0 + SPACE + width),
        };
        let usual = point.0 > 0.7;
        let lines = (0..=MAX_LINES).flat_map(|line| [line, -line]);
        let places = lines.flat_map(|line| [(line, usual), (line, !usual)]);
        let free = places.map(|(line, is_left)| (point.1 + LINE * f64::from(line), is_left)).find(
            |(height, is_left)| {
                let (left, right) = span(*is_left);
                let is_clear =
                    |l: f64, r: f64, h: f64, room: f64| r <= left || right <= l || (h - height).abs() >= room;
                left >= -SPACE
                    && right <= 1.0 + SPACE
                    && (0.0..=1.0).contains(height)
                    && self.boxes.iter().all(|(l, r, h)| is_clear(*l, *r, *h, LINE))
                    && self.points.iter().all(|(px, py)| is_clear(*px, *px, *py, 0.6 * LINE))
            },
        );
        let (height, is_left) = free.unwrap_or((point.1, usual));
        let (left, right) = span(is_left);
        self.boxes.push((left, right, height));
        (height, is_left)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn points_fall_where_the_axes_say_and_names_stay_text() {
        let dot = |label: &str, points| Dot { label: label.to_string(), colour: 2, points };
        let scatter =
            |dots| Scatter { title: "T", caption: "c", x: ("parameters", Unit::Number, true), dots };
        let html = scatter(vec![
            dot("<a>", vec![(100.0, 0.0)]),
            dot("b", vec![(1e4, 40.0), (1e6, 20.0), (f64::NAN, 1.0)]),
        ])
        .html()
        .unwrap();
        // The axis is logarithmic from 1e2 to 1e6, so 1e4 lies in its middle.
        assert!(html.contains("M500.0 0.0L1000.0 500.0") && html.contains("M0.0 1000.0h0"), "{html}");
        assert!(
            html.contains("&lt;a&gt;</b>")
                && html.contains("<b class=\"left\" style=\"left:100.00%;bottom:50.00%\">b")
        );
        assert!(html.contains("c against parameters, logarithmic"));
        assert!(scatter(vec![dot("x", vec![(f64::NAN, 1.0)])]).html().is_none());
    }

    #[test]
    fn no_name_covers_another() {
        let mut names = Names { points: vec![(0.5, 0.5); 9], ..Names::default() };
        let placed: Vec<(f64, bool)> = (0..9).map(|_| names.place((0.5, 0.5), 8)).collect();
        assert_eq!(placed[..2], [(0.5, false), (0.5, true)]);
        assert!(placed[2..].iter().all(|(height, _)| *height != 0.5));
        for (i, a) in names.boxes.iter().enumerate() {
            let overlaps = |b: &(f64, f64, f64)| a.0 < b.1 && b.0 < a.1 && (a.2 - b.2).abs() < 0.99 * LINE;
            assert!(!names.boxes[..i].iter().any(overlaps), "{:?}", names.boxes);
        }
        // At the edges it stays within.
        assert!(names.place((0.99, 0.0), 10).1 && !names.place((0.01, 1.0), 10).1);
        // Where there is no room at all it stands where it would.
        assert_eq!(names.place((0.5, 0.2), 90), (0.2, false));
    }
}
