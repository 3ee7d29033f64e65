//! What an exchange does to values and moments.

#![allow(clippy::unwrap_used)]
use super::*;
use peft_core::train::ParameterStep;

const PATH: &str = "m";
const RECIPE: AdamW = AdamW { beta_1: 0.9, beta_2: 0.999, epsilon: 1e-8, weight_decay: 0.0 };

/// A 4×5 weight with entries at those positions.
fn form(positions: &[u32], values: Vec<f32>) -> Sparse {
    let pattern = Arc::new(SparsePattern::new([4, 5], positions.to_vec()).unwrap());
    Sparse::new(PATH, pattern, row_tensor(values, &Device::flex()))
}

/// Takes the entries `leaving` out and puts `arrivals` in.
fn exchange(
    form: &mut Sparse,
    optimizer: &mut dyn ParameterOptimizer,
    leaving: &[usize],
    arrivals: &[(u32, Seed)],
) {
    let values = form.values.to_host();
    Entries::exchanged(&form.pattern, leaving, arrivals).take_up(form, optimizer, &values);
}

/// One step with those gradients.
fn step(optimizer: &mut dyn ParameterOptimizer, form: &mut Sparse, gradient: Vec<f32>) {
    let gradient = row_tensor(gradient, &Device::flex());
    let (name, value) = (&form.values.name, form.values.value.clone());
    let step = ParameterStep { name, learning_rate: 0.01, value, gradient };
    form.values.value = optimizer.step(vec![step], None).remove(0);
}

fn memory(optimizer: &mut dyn ParameterOptimizer, form: &Sparse) -> BTreeMap<String, Vec<f32>> {
    let mut memory = BTreeMap::new();
    optimizer.edit(&form.values.name, &Device::flex(), &mut |leaf, tensor| {
        memory.insert(leaf.to_string(), host(&tensor));
        tensor
    });
    memory
}

#[test]
fn what_stays_keeps_everything_and_what_comes_is_seeded() {
    let mut optimizer = NamedOptimizer::new(SparseBlock::default().adamw(&RECIPE));
    let mut form = form(&[2, 7, 11, 19], vec![0.5, -0.25, 2.0, 1.0]);
    step(&mut optimizer, &mut form, vec![1.0, -2.0, 3.0, 4.0]);
    let (values, before) = (form.values.to_host(), memory(&mut optimizer, &form));
    let seed = Seed { moment_1: 0.125, moment_2: 0.75, age: 6.0 };
    exchange(&mut form, &mut optimizer, &[0, 2], &[(8, seed), (0, Seed::default())]);
    assert_eq!(form.pattern.positions(), [0, 7, 8, 19]);
    assert_eq!(form.values.to_host(), [0.0, values[1], 0.0, values[3]]);
    let after = memory(&mut optimizer, &form);
    let expected = |leaf: &str, come: f32| vec![0.0, before[leaf][1], come, before[leaf][3]];
    for (leaf, come) in [("moment_1", 0.125), ("moment_2", 0.75), ("age", 6.0)] {
        assert_eq!(after[leaf], expected(leaf, come), "{leaf}");
    }
    assert_eq!(before["age"], [2.0; 4]);
    // The next step finds everything in its new place.
    step(&mut optimizer, &mut form, vec![0.0; 4]);
    assert_eq!(memory(&mut optimizer, &form)["age"], [1.0, 3.0, 7.0, 3.0]);
}

#[test]
fn a_position_that_leaves_and_comes_keeps_value_and_age() {
    let mut optimizer = NamedOptimizer::new(SparseBlock::default().adamw(&RECIPE));
    let mut form = form(&[2, 7, 11], vec![0.001, 0.002, 2.0]);
    step(&mut optimizer, &mut form, vec![0.0, 0.0, 1.0]);
    let values = form.values.to_host();
    let candidates = Candidates {
        positions: vec![1, 7, 15],
        sums: vec![0.25, 9.0, -5.0],
        squares: vec![1.0; 3],
        samples: 5,
    };
    let chosen = by_gradients(&values, form.pattern.positions(), &candidates, 2).unwrap();
    let seed = SparseBlock::default().adamw(&RECIPE).seed(-5.0, 1.0, 5, 5, false);
    exchange(&mut form, &mut optimizer, &chosen.leaving, &[(15, seed)]);
    assert_eq!(form.pattern.positions(), [7, 11, 15]);
    assert_eq!(form.values.to_host(), [values[1], values[2], 0.0]);
    assert_eq!(memory(&mut optimizer, &form)["age"], [2.0, 2.0, 6.0]);
}

#[test]
fn moments_of_rows_and_columns_stay() {
    let block = SparseBlock { momentum: 0.5, ..SparseBlock::default() };
    let patterns = Patterns::default();
    let mut optimizer = Sm3::new(block.sm3(&RECIPE), patterns.clone());
    let mut form = form(&[2, 7, 11], vec![0.0; 3]);
    patterns.set(&form.values.name, form.pattern.clone());
    step(&mut optimizer, &mut form, vec![1.0, 2.0, 3.0]);
    let before = memory(&mut optimizer, &form);
    exchange(&mut form, &mut optimizer, &[1], &[(13, Seed::default())]);
    patterns.set(&form.values.name, form.pattern.clone());
    let after = memory(&mut optimizer, &form);
    assert_eq!((&after["row"], &after["column"]), (&before["row"], &before["column"]));
    assert_eq!(after["momentum"], [before["momentum"][0], before["momentum"][2], 0.0]);
    assert_eq!(moments(&mut optimizer, &form), (vec![1.0, 4.0, 9.0, 0.0], vec![0.0, 9.0, 4.0, 0.0, 0.0]));
}

#[test]
fn draws_are_even_and_without_repetition() {
    let mut counts = [0usize; 20];
    for run in 0..4000 {
        let positions = drawn(5, 20, &mut Stream::new(run, "test", "drawn", &[]));
        assert!(positions.len() == 5 && positions.windows(2).all(|pair| pair[0] < pair[1]));
        positions.iter().for_each(|position| counts[*position as usize] += 1);
    }
    // 1000 each, with a deviation of 27.
    assert!(counts.iter().all(|count| (860..1140).contains(count)), "{counts:?}");
    assert_eq!(drawn(6, 6, &mut Stream::new(0, "test", "drawn", &[])), [0, 1, 2, 3, 4, 5]);
}
