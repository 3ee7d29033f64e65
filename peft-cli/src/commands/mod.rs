//! One command, one file.

pub mod compare;
pub mod doctor;
pub mod evaluate;
pub mod export;
pub mod generate;
pub mod init;
pub mod inspect;
pub mod merge;
pub mod methods;
pub mod plan;
pub mod push;
pub mod report;
pub mod train;

mod data;
mod unmerge;
