//! A chart as inline SVG with labels in HTML.
//!
//! The drawing stretches to whatever room there is while its lines stay thin and its labels stay text of one size, so
//! that a page reads the same on a phone and on a wide screen. Curves carry their values for the read-out under the
//! pointer; without a script the chart is complete all the same.

use super::html::escape;
use super::scale::{Axis, Unit, scientific};
use super::series::{MAX_POINTS, Point, downsample};
use crate::render;
use serde_json::{Value, json};
use std::fmt::Write;

/// How a curve is drawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Look {
    /// A full line.
    Line,
    /// A faint line behind the others.
    Faint,
    /// Dots joined by a line.
    Dots,
}

/// One curve.
#[derive(Debug, Clone)]
pub struct Curve {
    /// Its name in the legend.
    pub name: &'static str,
    /// The number of its colour in the style sheet, from 1.
    pub colour: usize,
    /// How it is drawn.
    pub look: Look,
    /// Its points, x ascending.
    pub points: Vec<Point>,
}

/// A chart over training steps.
#[derive(Debug, Clone)]
pub struct Chart {
    /// Its name.
    pub title: &'static str,
    /// What the vertical axis counts, in words.
    pub caption: &'static str,
    /// What the vertical axis counts.
    pub unit: Unit,
    /// Whether the vertical axis begins at 0.
    pub from_zero: bool,
    /// Whether a wide range may be drawn on a logarithmic axis.
    pub log: bool,
    /// The curves, drawn in this order.
    pub curves: Vec<Curve>,
    /// Whether the chart takes the full width.
    pub wide: bool,
}

/// Units of the drawing's own coordinates in each direction.
const SIZE: f64 = 1000.0;

impl Chart {
    /// The chart as HTML; `None` where no curve has a finite point. `steps` is the last step on the horizontal axis.
    pub fn html(&self, steps: f64) -> Option<String> {
        let curves: Vec<Curve> = self.curves.iter().filter_map(drawable).collect();
        let all = || curves.iter().flat_map(|curve| &curve.points);
        let first = all().map(|point| point.0).reduce(f64::min)?;
        let low = all().map(|point| point.1).reduce(f64::min)?;
        let high = all().map(|point| point.1).reduce(f64::max)?;
        let last = all().map(|point| point.0).fold(steps, f64::max);
        let x = Axis::steps(if first <= 1.0 { 0.0 } else { first }, last);
        let y = Axis::around(low, high, self.unit, self.from_zero, self.log);

        let mut out = String::new();
        let wide = if self.wide { " wide" } else { "" };
        let scale = if y.log { ", logarithmic" } else { "" };
        let _ = write!(
            out,
            "<figure class=\"chart{wide}\">\n<figcaption><h3>{}</h3><span>{}{scale}</span>",
            escape(self.title),
            escape(self.caption)
        );
        if curves.len() > 1 {
            out.push_str("<ul class=\"legend\">");
            for curve in &curves {
                let look = match curve.look {
                    Look::Line => "line",
                    Look::Faint => "faint",
                    Look::Dots => "dots",
                };
                let _ =
                    write!(out, "<li><i class=\"{look} c{}\"></i>{}</li>", curve.colour, escape(curve.name));
            }
            out.push_str("</ul>");
        }
        out.push_str("</figcaption>\n");

        let labels: Vec<String> = y.ticks.iter().map(|tick| y.label(*tick)).collect();
        let gutter = labels.iter().map(|label| label.chars().count()).max().unwrap_or(1);
        let data = readout(&curves, self.unit, &x);
        let _ = write!(
            out,
            "<div class=\"plot\" style=\"--gutter:{gutter}ch\" data-chart=\"{}\">\n<div class=\"y\">",
            escape(&data.to_string())
        );
        for (tick, label) in y.ticks.iter().zip(&labels) {
            let _ = write!(out, "<span style=\"bottom:{:.2}%\">{label}</span>", 100.0 * y.place(*tick));
        }
        out.push_str("</div>\n<div class=\"area\">");
        out.push_str(&self.drawing(&curves, &x, &y));
        out.push_str("</div>\n<div class=\"x\">");
        for tick in &x.ticks {
            let _ =
                write!(out, "<span style=\"left:{:.2}%\">{}</span>", 100.0 * x.place(*tick), x.label(*tick));
        }
        out.push_str("</div>\n</div>\n</figure>\n");
        Some(out)
    }

    fn drawing(&self, curves: &[Curve], x: &Axis, y: &Axis) -> String {
        let mut out = String::new();
        let _ = write!(
            out,
            "<svg viewBox=\"0 0 {SIZE} {SIZE}\" preserveAspectRatio=\"none\" role=\"img\" aria-label=\"{}\">",
            escape(&self.in_words(curves))
        );
        let mut grid = String::new();
        for tick in &y.ticks {
            let _ = write!(grid, "M0 {:.1}H{SIZE}", SIZE * (1.0 - y.place(*tick)));
        }
        let _ = write!(out, "<path class=\"grid\" d=\"{grid}\"/>");
        for curve in curves {
            let place = |point: &Point| (SIZE * x.place(point.0), SIZE * (1.0 - y.place(point.1)));
            let mut line = String::new();
            for (i, point) in curve.points.iter().enumerate() {
                let (px, py) = place(point);
                let _ = write!(line, "{}{px:.1} {py:.1}", if i == 0 { 'M' } else { 'L' });
            }
            let (look, colour) = (curve.look, curve.colour);
            let class = match look {
                Look::Line => "line",
                Look::Faint => "faint",
                Look::Dots => "joined",
            };
            // Two measurements say nothing of the way between them.
            if look != Look::Dots || curve.points.len() > 2 {
                let _ = write!(out, "<path class=\"{class} c{colour}\" d=\"{line}\"/>");
            }
            if look == Look::Dots || curve.points.len() == 1 {
                // A line of no length with round ends is a dot that does not stretch with the drawing.
                let mut dots = String::new();
                for point in &curve.points {
                    let (px, py) = place(point);
                    let _ = write!(dots, "M{px:.1} {py:.1}h0");
                }
                let _ = write!(out, "<path class=\"dots c{colour}\" d=\"{dots}\"/>");
            }
        }
        out.push_str("</svg>");
        out
    }

    /// What the picture shows, for those who cannot see it.
    fn in_words(&self, curves: &[Curve]) -> String {
        let ends = curves.iter().filter(|curve| curve.look != Look::Faint).filter_map(|curve| {
            let (first, last) = (curve.points.first()?, curve.points.last()?);
            let (from, to) = (value(first.1, self.unit), value(last.1, self.unit));
            Some(format!("{} from {from} at step {} to {to} at step {}", curve.name, first.0, last.0))
        });
        format!("{}: {}", self.title, ends.collect::<Vec<_>>().join("; "))
    }
}

/// The curve as drawn: finite points alone, few enough.
fn drawable(curve: &Curve) -> Option<Curve> {
    let finite: Vec<Point> = curve.points.iter().copied().filter(|(_, y)| y.is_finite()).collect();
    let points = downsample(&finite, MAX_POINTS);
    (!points.is_empty()).then(|| Curve { points, ..curve.clone() })
}

/// What the read-out needs: the span of the steps, and for each curve its name, steps and written values.
fn readout(curves: &[Curve], unit: Unit, x: &Axis) -> Value {
    let curves = curves.iter().map(|curve| {
        let steps: Vec<u64> = curve.points.iter().map(|point| point.0 as u64).collect();
        let values: Vec<String> = curve.points.iter().map(|point| value(point.1, unit)).collect();
        json!({"name": curve.name, "colour": curve.colour, "steps": steps, "values": values})
    });
    json!({"low": x.low, "high": x.high, "curves": curves.collect::<Vec<_>>()})
}

/// A measured value in its unit.
pub fn value(value: f64, unit: Unit) -> String {
    match unit {
        Unit::Bytes => render::bytes(value.max(0.0) as u64),
        Unit::Scientific => scientific(value),
        Unit::Count => render::count(value.abs().round() as u64),
        Unit::Number if value.abs() >= 1000.0 => render::count(value.abs().round() as u64),
        Unit::Number if value != 0.0 && value.abs() < 1e-3 => scientific(value),
        Unit::Number => format!("{value:.4}"),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn chart(points: Vec<Point>) -> Chart {
        let curve = Curve { name: "train", colour: 1, look: Look::Line, points };
        Chart {
            title: "Loss",
            caption: "nats a token",
            unit: Unit::Number,
            from_zero: true,
            log: false,
            curves: vec![curve],
            wide: false,
        }
    }

    #[test]
    fn points_fall_where_the_axes_say() {
        let html = chart(vec![(0.0, 4.0), (50.0, 2.0), (100.0, 0.0)]).html(100.0).unwrap();
        assert!(html.contains("d=\"M0.0 0.0L500.0 500.0L1000.0 1000.0\""), "{html}");
        assert!(html.contains("<span style=\"bottom:50.00%\">2</span>"), "{html}");
        assert!(html.contains("aria-label=\"Loss: train from 4.0000 at step 0 to 0.0000 at step 100\""));
    }

    #[test]
    fn a_chart_needs_a_finite_point_and_a_long_run_stays_small() {
        assert!(chart(vec![(1.0, f64::NAN)]).html(1.0).is_none());
        assert!(chart(vec![(1.0, 2.0)]).html(1.0).unwrap().contains("class=\"dots c1\""));
        let long = chart((0..200_000).map(|i| (f64::from(i), f64::from(i % 13))).collect());
        let html = long.html(200_000.0).unwrap();
        let path = html.split("class=\"line c1\" d=\"").nth(1).unwrap().split('"').next().unwrap();
        assert!(path.matches(['M', 'L']).count() <= MAX_POINTS);
        assert!(html.len() < 80_000, "{}", html.len());
    }
}
