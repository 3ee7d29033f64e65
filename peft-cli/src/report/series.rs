//! Curves as lists of points, fit to be drawn.

/// A point, x then y.
pub type Point = (f64, f64);

/// The most points a drawn curve has.
pub const MAX_POINTS: usize = 1000;

/// The curve in at most `limit` points that keep its outline: of each stretch the lowest and the highest point, in
/// their order, and the two ends.
pub fn downsample(points: &[Point], limit: usize) -> Vec<Point> {
    let inner = match points {
        [_, inner @ .., _] if points.len() > limit => inner,
        _ => return points.to_vec(),
    };
    let buckets = (limit.saturating_sub(2) / 2).max(1);
    let mut kept = vec![points[0]];
    for bucket in 0..buckets {
        let stretch = &inner[bucket * inner.len() / buckets..(bucket + 1) * inner.len() / buckets];
        let by_height = |a: &&Point, b: &&Point| a.1.total_cmp(&b.1);
        let (Some(low), Some(high)) = (stretch.iter().min_by(by_height), stretch.iter().max_by(by_height))
        else {
            continue;
        };
        let (first, second) = if low.0 <= high.0 { (low, high) } else { (high, low) };
        kept.push(*first);
        if second.0 > first.0 {
            kept.push(*second);
        }
    }
    kept.push(points[points.len() - 1]);
    kept
}

/// The curve without its noise: the mean of a window around each point, about a fortieth of the run wide and narrower
/// towards the ends, so that it lags behind nothing. `None` for a curve too short to need one.
pub fn smooth(points: &[Point]) -> Option<Vec<Point>> {
    const SHORT: usize = 20;
    if points.len() < SHORT {
        return None;
    }
    let reach = (points.len() / 80).max(2);
    let mut sums = vec![0.0];
    sums.extend(points.iter().scan(0.0, |sum, (_, y)| {
        *sum += y;
        Some(*sum)
    }));
    let mean = |at: usize| {
        let reach = reach.min(at).min(points.len() - 1 - at);
        (sums[at + reach + 1] - sums[at - reach]) / (2 * reach + 1) as f64
    };
    Some(points.iter().enumerate().map(|(at, (x, _))| (*x, mean(at))).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_curve_keeps_its_peaks_and_ends_in_few_points() {
        let mut points: Vec<Point> = (0..100_000).map(|i| (f64::from(i), f64::from(i % 7))).collect();
        points[54_321].1 = 1e6;
        points[12_345].1 = -1e6;
        let drawn = downsample(&points, MAX_POINTS);
        assert!(drawn.len() <= MAX_POINTS && drawn.len() > MAX_POINTS / 2, "{}", drawn.len());
        assert_eq!((drawn.first(), drawn.last()), (points.first(), points.last()));
        assert!(drawn.contains(&(54_321.0, 1e6)) && drawn.contains(&(12_345.0, -1e6)));
        assert!(drawn.windows(2).all(|pair| pair[0].0 < pair[1].0));
        assert_eq!(downsample(&points[..1000], MAX_POINTS), points[..1000]);
    }

    #[test]
    fn the_mean_keeps_the_ends_and_a_straight_line_and_spreads_a_peak() {
        let mut points: Vec<Point> = (0..40).map(|i| (f64::from(i), 3.0 * f64::from(i))).collect();
        let close = |a: f64, b: f64| (a - b).abs() < 1e-9;
        let smoothed = smooth(&points).unwrap_or_default();
        assert!(smoothed.iter().zip(&points).all(|(a, b)| close(a.1, b.1)));
        points[20].1 += 5.0;
        let smoothed = smooth(&points).unwrap_or_default();
        assert!(close(smoothed[18].1, 54.0 + 1.0) && close(smoothed[20].1, 60.0 + 1.0));
        assert!(close(smoothed[17].1, 51.0));
        assert!(smooth(&points[..10]).is_none());
    }
}
