//! Whole-program tests, parity with golden values, faults.
#![allow(clippy::unwrap_used)]

mod adapters;
mod card;
mod compare;
mod contract;
mod doctor;
mod families;
mod faults;
mod generation;
mod gradients;
mod init;
mod inits;
mod kin;
mod lamda;
mod lora_sb;
mod merging;
mod nola;
mod packing;
mod plan;
mod program;
mod push;
mod recipes;
mod report;
mod resume;
mod rope;
mod security;
mod sparse;
mod states;
mod templates;
mod trajectory;
mod variants;
