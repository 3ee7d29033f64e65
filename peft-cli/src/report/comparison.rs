//! The page of a comparison: accuracy against what it costs, the table, and every run.

use super::html::escape;
use super::scale::Unit;
use super::scatter::{Dot, Scatter};
use super::{document, section};
use std::fmt::Write;

/// What the page shows.
pub struct Comparison<'a> {
    /// Its name.
    pub title: &'a str,
    /// The base model.
    pub base: &'a str,
    /// How the table is to be read.
    pub note: &'a str,
    /// The table's columns.
    pub head: &'a [&'a str],
    /// The methods.
    pub rows: &'a [Row<'a>],
    /// Every run.
    pub runs: &'a [RunLine<'a>],
}

/// A method.
pub struct Row<'a> {
    /// Its label.
    pub label: &'a str,
    /// Its cells, the label first; fewer than there are columns where it has no figures.
    pub cells: Vec<String>,
    /// Where it stands in the charts.
    pub figures: Option<Figures>,
    /// Rates and their mean validation loss.
    pub sweep: &'a [(f64, f64)],
    /// What else there is to know.
    pub remarks: &'a [String],
}

/// A method's place in the charts.
#[derive(Debug, Clone, Copy)]
pub struct Figures {
    /// Share of exact answers, or of tokens.
    pub accuracy: f64,
    /// Whether it is of answers.
    pub answers: bool,
    /// Trained parameters.
    pub trainable: f64,
    /// Peak memory.
    pub peak_bytes: Option<f64>,
    /// Tokens a second.
    pub tokens_per_second: f64,
}

/// A run.
pub struct RunLine<'a> {
    /// Its folder's name.
    pub name: &'a str,
    /// What came of it.
    pub said: String,
    /// Whether it has a report of its own.
    pub has_report: bool,
}

/// The page, complete in itself but for the links to the runs' own reports.
pub fn html(comparison: &Comparison) -> String {
    let mut body = String::new();
    let measured = comparison.rows.iter().filter(|row| row.figures.is_some()).count();
    let _ = write!(
        body,
        "<header>\n<p class=\"eyebrow\">Comparison of methods <span class=\"state\">{measured} of {} with figures</span></p>\n\
         <h1>{}</h1>\n<p class=\"what\">{} runs on {}</p>\n</header>\n",
        comparison.rows.len(),
        escape(comparison.title),
        comparison.runs.len(),
        escape(comparison.base)
    );
    body.push_str(&charts(comparison.rows));
    body.push_str(&section("Methods", &table(comparison)));
    body.push_str(&section("Runs", &runs(comparison.runs)));
    document(&format!("{} · comparison", escape(comparison.title)), &body)
}

fn charts(rows: &[Row]) -> String {
    let answers = rows.iter().filter_map(|row| row.figures).all(|figures| figures.answers);
    let caption = if answers { "exact answers, %" } else { "token accuracy, %" };
    let against = |cost: &dyn Fn(&Figures) -> Option<f64>| -> Vec<Dot> {
        let dot = |(place, row): (usize, &Row)| {
            let figures = row.figures?;
            let points = vec![(cost(&figures)?, 100.0 * figures.accuracy)];
            Some(Dot { label: row.label.to_string(), colour: colour(place), points })
        };
        rows.iter().enumerate().filter_map(dot).collect()
    };
    let sweeps = rows.iter().enumerate().filter(|(_, row)| row.sweep.len() > 1).map(|(place, row)| Dot {
        label: row.label.to_string(),
        colour: colour(place),
        points: row.sweep.to_vec(),
    });
    let scatter = |title, caption, x: (&'static str, Unit, bool), dots| Scatter { title, caption, x, dots };
    let parameters = ("trained parameters", Unit::Count, true);
    let drawn: String = [
        scatter("Trained parameters", caption, parameters, against(&|f| Some(f.trainable))),
        scatter("Peak memory", caption, ("bytes", Unit::Bytes, false), against(&|f| f.peak_bytes)),
        scatter(
            "Speed",
            caption,
            ("tokens a second", Unit::Number, false),
            against(&|f| Some(f.tokens_per_second)),
        ),
        scatter(
            "Rates tried",
            "mean validation loss",
            ("learning rate", Unit::Scientific, true),
            sweeps.collect(),
        ),
    ]
    .iter()
    .filter_map(Scatter::html)
    .collect();
    match drawn.as_str() {
        "" => String::new(),
        _ => section("What it costs", &format!("<div class=\"charts\">\n{drawn}</div>\n")),
    }
}

/// The numbers in the style sheet of the methods' colours.
const COLOURS: [usize; 12] = [1, 2, 3, 4, 5, 6, 8, 9, 10, 11, 12, 13];

fn colour(place: usize) -> usize {
    COLOURS[place % COLOURS.len()]
}

fn table(comparison: &Comparison) -> String {
    let mut out = String::from("<div class=\"scroll methods\"><table>\n<tr>");
    for (i, name) in comparison.head.iter().enumerate() {
        let class = if i == 0 { "" } else { " class=\"n\"" };
        let _ = write!(out, "<th{class}>{}</th>", escape(name));
    }
    out.push_str("</tr>\n");
    for (place, row) in comparison.rows.iter().enumerate() {
        out.push_str("<tr>");
        for (i, cell) in row.cells.iter().enumerate() {
            let _ = match i {
                0 => write!(out, "<td><i class=\"swatch c{}\"></i>{}</td>", colour(place), escape(cell)),
                _ => write!(out, "<td class=\"n\">{}</td>", escape(cell)),
            };
        }
        let missing = comparison.head.len() - row.cells.len().min(comparison.head.len());
        out.push_str(&"<td></td>".repeat(missing));
        out.push_str("</tr>\n");
    }
    out.push_str("</table></div>\n");
    for row in comparison.rows {
        for remark in row.remarks {
            let _ = writeln!(out, "<p class=\"note\">{}: {}</p>", escape(row.label), escape(remark));
        }
    }
    let _ = writeln!(out, "<p class=\"note\">{}</p>", escape(comparison.note));
    out
}

fn runs(runs: &[RunLine]) -> String {
    let mut out =
        String::from("<div class=\"scroll\"><table>\n<tr><th>run</th><th>what came of it</th></tr>\n");
    for run in runs {
        let name = escape(run.name);
        let name = match run.has_report {
            // A label has no character that means something in an address but `+`, which stands for itself in a path.
            true => format!("<a href=\"runs/{name}/report.html\">{name}</a>"),
            false => name,
        };
        let _ = writeln!(out, "<tr><td>{name}</td><td>{}</td></tr>", escape(&run.said));
    }
    out.push_str("</table></div>\n");
    out
}
