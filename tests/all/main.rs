//! Whole-program tests, parity with golden values, faults.
#![allow(clippy::unwrap_used)]

mod adapters;
mod card;
mod families;
mod faults;
mod gradients;
mod merging;
mod packing;
mod plan;
mod program;
mod push;
mod report;
mod resume;
mod rope;
mod security;
mod templates;
mod trajectory;
mod variants;
