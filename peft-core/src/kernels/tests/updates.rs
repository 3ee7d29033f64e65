//! The optimizers' updates of many parameters.

use super::*;

#[test]
fn updates_by_age() {
    for (device, _, limit) in places() {
        let place = (device, DType::F32, limit);
        let optimizer = AgedAdamW { beta_1: 0.9, beta_2: 0.999, epsilon: 1e-6, weight_decay: 0.1 };
        let updates = || -> Vec<AgedUpdate<Tensor<2>>> {
            (0..70)
                .map(|index| {
                    let shape = [1, 1 + 1931 * (index % 5)];
                    let tensor = |what: &str| random(&format!("{what}{index}"), shape, &place);
                    // Elements of all ages, from the first update to the 40,000th.
                    let age = tensor("a").square().mul_scalar(10_000.0).floor().add_scalar(1.0);
                    AgedUpdate {
                        parameter: tensor("p"),
                        gradient: tensor("g"),
                        moment_1: tensor("m"),
                        moment_2: tensor("v").square(),
                        age,
                        rate: 0.01 * (1 + index % 3) as f64,
                    }
                })
                .collect()
        };
        // A norm of 5 clipped to 2; one of 1, which stays; one that is not finite, which changes nothing.
        for (norm, factor) in [(5f32, Some(0.4)), (1.0, Some(1.0)), (f32::INFINITY, None)] {
            let sum_of_squares = Tensor::from_data([norm * norm], (&place.0, DType::F32));
            let clip = Clip { sum_of_squares, max_norm: 2.0 };
            let expected = updates().into_iter().map(|mut update| match factor {
                Some(factor) => {
                    update.gradient = update.gradient.mul_scalar(factor);
                    optimizer.update(update)
                }
                None => [update.parameter, update.moment_1, update.moment_2, update.age],
            });
            for (found, expected) in optimizer.update_all(updates(), Some(&clip)).into_iter().zip(expected) {
                for (found, expected) in found.into_iter().zip(expected) {
                    assert_close(&format!("update, norm {norm}"), found, expected, 1e-5);
                }
            }
        }
    }
}

#[test]
fn updates_of_many_parameters() {
    for (device, _, limit) in places() {
        let place = (device, DType::F32, limit);
        let optimizer = AdamW { beta_1: 0.9, beta_2: 0.99, epsilon: 1e-8, weight_decay: 0.1 };
        let updates = || -> Vec<Update<Tensor<2>>> {
            (0..70)
                .map(|index| {
                    let shape = [1 + index % 7, 3 + 131 * (index % 5)];
                    let tensor = |what: &str| random(&format!("{what}{index}"), shape, &place);
                    Update {
                        parameter: tensor("p"),
                        gradient: tensor("g"),
                        moment_1: tensor("m"),
                        moment_2: tensor("v").square(),
                        rate: 0.01 * (1 + index % 3) as f64,
                        time: 1 + (index % 2) as i64,
                    }
                })
                .collect()
        };
        let squares = sum_of_squares(updates().into_iter().map(|update| update.gradient).collect());
        let one_by_one = updates().into_iter().map(|update| update.gradient.square().sum());
        let expected = one_by_one.reduce(|sum, square| sum + square).unwrap();
        assert_close("squares", squares.unwrap(), expected, 1e-5);
        let expected = updates().into_iter().map(|update| optimizer.update(update));
        for (found, expected) in optimizer.update_all(updates(), None).into_iter().zip(expected) {
            for (found, expected) in found.into_iter().zip(expected) {
                assert_close("update", found, expected, 1e-5);
            }
        }
        // A norm of 5 clipped to 2; one of 1, which stays; one that is not finite, which changes nothing.
        for (norm, max_norm, factor) in [(5f32, 2.0, 0.4), (1.0, 2.0, 1.0), (f32::NAN, 2.0, 0.0)] {
            let sum_of_squares = Tensor::from_data([norm * norm], (&place.0, DType::F32));
            let clip = Clip { sum_of_squares, max_norm };
            let expected = updates().into_iter().map(|mut update| {
                update.gradient = update.gradient.mul_scalar(factor);
                match norm.is_finite() {
                    true => optimizer.update(update),
                    false => [update.parameter, update.moment_1, update.moment_2],
                }
            });
            for (found, expected) in optimizer.update_all(updates(), Some(&clip)).into_iter().zip(expected) {
                for (found, expected) in found.into_iter().zip(expected) {
                    assert_close(&format!("norm {norm}"), found, expected, 1e-5);
                }
            }
        }
    }
}
