//! The command line.

use clap::{ArgGroup, Args, Parser, Subcommand, ValueEnum};
use std::num::NonZeroUsize;
use std::path::PathBuf;

/// Parameter-efficient fine-tuning of Hugging Face checkpoints, without Python.
#[derive(Parser)]
#[command(name = "peft", version, propagate_version = true)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// Exit codes: 0 done, 2 bad input (one clear error on stderr), 1 anything else.
#[derive(Subcommand)]
pub enum Command {
    /// What a recipe's run will be: what trains, how many steps, how much memory. No weights are read.
    Plan(PlanArgs),
    /// Write a commented recipe to begin with.
    Init(InitArgs),
    /// The methods that a recipe can name.
    Methods(MethodsArgs),
    /// Run a recipe: adapt a base model to data.
    Train(TrainArgs),
    /// Run a recipe with several methods, rates and seeds, and set the results beside each other.
    Compare(CompareArgs),
    /// Loss, perplexity, token accuracy and exact match on a data file.
    #[command(alias = "eval")]
    Evaluate(EvaluateArgs),
    /// Continue a prompt, or chat.
    #[command(alias = "chat")]
    Generate(GenerateArgs),
    /// Fold one adapter into its base and write an ordinary checkpoint.
    #[command(aliases = ["fuse", "fold"])]
    Merge(MergeArgs),
    /// Write an adapter in another form.
    Export(ExportArgs),
    /// Upload an adapter or checkpoint to the hub.
    Push(PushArgs),
    /// Show what is in a checkpoint, an adapter or a data file.
    Inspect(InspectArgs),
    /// Write report.html for a run again, from the files in its folder.
    Report(ReportArgs),
    /// What this machine can run.
    Doctor(DoctorArgs),
}

/// `peft init`.
#[derive(Args)]
pub struct InitArgs {
    /// The recipe to write; a file that is there is never overwritten.
    #[arg(value_name = "OUT.yaml")]
    pub output: PathBuf,
    /// A method of `peft methods`, or a kind of LoRA: rslora, dora, lora+, lora-fa.
    #[arg(long, value_name = "M", default_value = "lora")]
    pub method: String,
    /// A checkpoint folder or a hub id (`org/name`). If it is on this machine, lengths are measured with it.
    #[arg(long, value_name = "B")]
    pub base_model: Option<String>,
    /// The data file; its fields tell its type.
    #[arg(long, value_name = "FILE")]
    pub data: Option<PathBuf>,
}

/// `peft methods`.
#[derive(Args)]
pub struct MethodsArgs {
    /// Print one JSON list.
    #[arg(long)]
    pub json: bool,
}

/// `peft export`.
#[derive(Args)]
#[command(group(ArgGroup::new("source").required(true).args(["path", "adapter"])))]
pub struct ExportArgs {
    /// The adapter's folder or hub id.
    #[arg(value_name = "ADAPTER")]
    path: Option<String>,
    /// The same.
    #[arg(long, value_name = "A")]
    adapter: Option<String>,
    /// The base, a folder or hub id; without it, the one that the adapter names. Its weights are not read.
    #[arg(long, value_name = "B")]
    pub base_model: Option<String>,
    /// Branch, tag or commit of a hub base.
    #[arg(long, value_name = "REV")]
    pub revision: Option<String>,
    /// The form to write.
    #[arg(long, value_enum)]
    pub format: ExportFormat,
    /// Share the singular values of each change evenly between its two factors, which suits further training.
    #[arg(long)]
    pub balanced: bool,
    /// The folder to write; it must be empty or not there.
    #[arg(short, long, value_name = "DIR")]
    pub output: PathBuf,
    /// Make no network connection at all.
    #[arg(long)]
    pub offline: bool,
    /// Print one JSON object.
    #[arg(long)]
    pub json: bool,
}

impl ExportArgs {
    /// The adapter, however it was named.
    pub fn source(&self) -> &str {
        self.path.as_deref().or(self.adapter.as_deref()).unwrap_or_default()
    }
}

/// What an adapter can be exported as.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ExportFormat {
    /// A plain LoRA that Hugging Face PEFT loads, where the changes have exact low-rank factors.
    PeftLora,
    /// A SHiRA that Hugging Face PEFT loads, of a sparse adapter.
    PeftShira,
}

/// `peft doctor`.
#[derive(Args)]
pub struct DoctorArgs {
    /// Print one JSON object.
    #[arg(long)]
    pub json: bool,
}

/// `peft plan`.
#[derive(Args)]
pub struct PlanArgs {
    /// The recipe, a YAML file.
    pub recipe: PathBuf,
    /// Set a key of the recipe, dots for nesting: `--override method.r=16`. May be repeated.
    #[arg(long = "override", value_name = "KEY=VALUE", num_args = 1..)]
    pub overrides: Vec<String>,
    /// Also run a few real steps to tell how long the run will take. This needs the weights, which are downloaded if
    /// they are not there.
    #[arg(long)]
    pub calibrate: bool,
    /// Make no network connection at all.
    #[arg(long)]
    pub offline: bool,
    /// Print one JSON object.
    #[arg(long)]
    pub json: bool,
}

/// `peft train`.
#[derive(Args)]
pub struct TrainArgs {
    /// The recipe, a YAML file.
    pub recipe: PathBuf,
    /// Where results go, in place of the recipe's `output_dir`.
    #[arg(long, value_name = "DIR")]
    pub output_dir: Option<PathBuf>,
    /// Continue from the newest checkpoint of the output folder (`auto`, which starts fresh where there is none) or from
    /// a checkpoint folder.
    #[arg(long, value_name = "auto|PATH")]
    pub resume: Option<String>,
    /// Set a key of the recipe, dots for nesting: `--override method.r=16`. May be repeated.
    #[arg(long = "override", value_name = "KEY=VALUE", num_args = 1..)]
    pub overrides: Vec<String>,
    /// Stop before the weights are loaded if the predicted peak of memory is more than is available.
    #[arg(long)]
    pub require_fit: bool,
    /// Make no network connection at all.
    #[arg(long)]
    pub offline: bool,
}

/// `peft compare`. Runs that are finished are not run again, interrupted ones go on.
#[derive(Args)]
pub struct CompareArgs {
    /// A recipe with a `compare` block in place of `method`.
    pub recipe: PathBuf,
    /// Where results go, in place of the recipe's `output_dir`.
    #[arg(long, value_name = "DIR")]
    pub output_dir: Option<PathBuf>,
    /// Set a key of the recipe, dots for nesting: `--override compare.seeds=[1,2]`. May be repeated.
    #[arg(long = "override", value_name = "KEY=VALUE", num_args = 1..)]
    pub overrides: Vec<String>,
    /// So many runs at once, for a device that one run does not fill. Their times are not those of a run alone.
    #[arg(long, value_name = "N", default_value = "1")]
    pub jobs: NonZeroUsize,
    /// Train nothing: write table and page again from the runs that are there.
    #[arg(long)]
    pub summary: bool,
    /// Make no network connection at all.
    #[arg(long)]
    pub offline: bool,
    /// Print one JSON object in place of the table.
    #[arg(long)]
    pub json: bool,
}

/// The model to use.
#[derive(Args)]
pub struct ModelArgs {
    /// A checkpoint folder or a hub id (`org/name`).
    #[arg(long, value_name = "B")]
    pub base_model: String,
    /// An adapter folder or hub id.
    #[arg(long, value_name = "A")]
    pub adapter: Option<String>,
    /// Branch, tag or commit of a hub base.
    #[arg(long)]
    pub revision: Option<String>,
    /// `auto`, `cpu`, `cuda` or `cuda:N`.
    #[arg(long, default_value = "auto")]
    pub device: String,
    /// Type of weights and activations: `auto` (f32 on CPU, bf16 on CUDA), `f32` or `bf16`.
    #[arg(long, default_value = "auto")]
    pub dtype: String,
    /// Make no network connection at all.
    #[arg(long)]
    pub offline: bool,
}

/// How conversations are written.
#[derive(Args)]
pub struct ChatArgs {
    /// A .jinja file, or the text of a template, in place of the tokenizer's chat template.
    #[arg(long, value_name = "FILE|TEXT")]
    pub chat_template: Option<String>,
    /// Further variables of the chat template, like '{enable_thinking: false}'.
    #[arg(long, value_name = "MAP")]
    pub chat_template_kwargs: Option<String>,
}

/// How a data file becomes examples.
#[derive(Args)]
pub struct DataArgs {
    /// alpaca, prompt_completion, messages or completion.
    #[arg(long = "type", value_name = "T", default_value = "alpaca")]
    pub kind: String,
    /// Name of a field in the data, `prompt=question`. May be repeated.
    #[arg(long = "field", value_name = "FIELD=NAME")]
    pub fields: Vec<String>,
    /// A key of a recipe's dataset, `roles_to_train=[user,assistant]`. May be repeated.
    #[arg(long = "dataset", value_name = "KEY=VALUE")]
    pub keys: Vec<String>,
    #[command(flatten)]
    pub chat: ChatArgs,
    /// Split a .txt file at this string instead of at lines.
    #[arg(long)]
    pub separator: Option<String>,
    /// Only the first N records.
    #[arg(long, value_name = "N")]
    pub limit: Option<usize>,
    /// Longest example in tokens.
    #[arg(long, default_value_t = 2048)]
    pub sequence_len: usize,
    /// What happens to longer ones: error, drop, left, right or split.
    #[arg(long)]
    pub on_truncation: Option<String>,
    /// Count the prompt's tokens too.
    #[arg(long)]
    pub train_on_inputs: bool,
}

/// `peft evaluate`.
#[derive(Args)]
pub struct EvaluateArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    /// The data file: json, jsonl, csv, tsv, parquet or txt.
    #[arg(long, value_name = "FILE")]
    pub data: PathBuf,
    #[command(flatten)]
    pub format: DataArgs,
    /// Also answer the first N examples greedily and count exact matches.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub exact_match: usize,
    /// Examples a batch.
    #[arg(long, value_name = "N", default_value_t = 8)]
    pub batch_size: usize,
    /// Print one JSON object.
    #[arg(long)]
    pub json: bool,
}

/// `peft generate`.
#[derive(Args)]
#[command(group = ArgGroup::new("given").args(["prompt", "prompts"]))]
pub struct GenerateArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    /// The text to continue; with --chat, the user's message.
    #[arg(long, value_name = "TEXT")]
    pub prompt: Option<String>,
    /// Many texts to continue: a .txt file, one a line, or records with `text` or `prompt`. Prints one JSON object a line
    /// with `prompt` and `generated`, in the file's order.
    #[arg(long, value_name = "FILE")]
    pub prompts: Option<PathBuf>,
    /// Prompts of --prompts that are continued at a time.
    #[arg(long, value_name = "N", default_value_t = 8, requires = "prompts")]
    pub batch_size: usize,
    /// Use the model's chat template; without --prompt or --prompts, converse.
    #[arg(long)]
    pub chat: bool,
    /// System message of a chat.
    #[arg(long, value_name = "TEXT", requires = "chat")]
    pub system: Option<String>,
    /// How the answer begins; with --prompt or --prompts.
    #[arg(long, value_name = "TEXT", requires = "chat", requires = "given")]
    pub prefill: Option<String>,
    #[command(flatten)]
    pub template: ChatArgs,
    /// Most tokens to generate.
    #[arg(long, value_name = "N", default_value_t = 256)]
    pub max_new_tokens: usize,
    /// 0 always takes the most likely token.
    #[arg(long, value_name = "T", default_value_t = 0.0)]
    pub temperature: f64,
    /// Draw from the K most likely tokens.
    #[arg(long, value_name = "K")]
    pub top_k: Option<usize>,
    /// Draw from the most likely tokens that together have probability P.
    #[arg(long, value_name = "P")]
    pub top_p: Option<f64>,
    /// Seed of the draws.
    #[arg(long, value_name = "S", default_value_t = 0)]
    pub seed: u64,
}

/// `peft merge`.
#[derive(Args)]
pub struct MergeArgs {
    /// A checkpoint folder or a hub id (`org/name`).
    #[arg(long, value_name = "B", required_unless_present = "unmerge")]
    pub base_model: Option<String>,
    /// An adapter folder or hub id.
    #[arg(long, value_name = "A")]
    pub adapter: String,
    /// A new or empty folder.
    #[arg(long, value_name = "DIR")]
    pub output: PathBuf,
    /// Type of the written weights, f32, bf16 or f16; each tensor keeps its own by default.
    #[arg(long, value_name = "D", conflicts_with = "unmerge")]
    pub dtype: Option<String>,
    /// Largest weight file, like 5GB or 500MB.
    #[arg(long, value_name = "S", default_value = "5GB")]
    pub max_shard_size: String,
    #[command(flatten)]
    pub check: MergeCheckArgs,
    /// Also keep the changed tensors as they were, beside the merged weights, so that --unmerge restores every byte
    /// without the base.
    #[arg(long, conflicts_with = "unmerge")]
    pub keep_original: bool,
    /// The way back: write what this merged checkpoint was before the adapter was merged into it. With --base-model or a
    /// kept original every byte is restored; without, the change is subtracted.
    #[arg(long, value_name = "DIR", conflicts_with_all = ["prompts", "max_drift", "force", "no_verify"])]
    pub unmerge: Option<PathBuf>,
    /// Branch, tag or commit of a hub base.
    #[arg(long)]
    pub revision: Option<String>,
    /// Make no network connection at all.
    #[arg(long)]
    pub offline: bool,
    /// Print one JSON object.
    #[arg(long)]
    pub json: bool,
}

/// How a merge is checked before it gets its name.
#[derive(Args)]
pub struct MergeCheckArgs {
    /// Prompts on which merged checkpoint and adapter are compared, in place of built-in ones: a .txt file, one a line, or
    /// records with `text` or `prompt`.
    #[arg(long, value_name = "FILE")]
    pub prompts: Option<PathBuf>,
    /// How far the logits may differ on average, relative to their spread; by default 0.0001 for f32, 0.02 for f16 and
    /// 0.15 for bf16. Beyond it nothing is kept.
    #[arg(long, value_name = "X")]
    pub max_drift: Option<f64>,
    /// Keep the result whatever the comparison says.
    #[arg(long)]
    pub force: bool,
    /// Do not compare at all.
    #[arg(long, conflicts_with_all = ["prompts", "max_drift", "force"])]
    pub no_verify: bool,
}

/// `peft push`.
#[derive(Args)]
pub struct PushArgs {
    /// The folder of an adapter or checkpoint.
    #[arg(value_name = "DIR")]
    pub dir: PathBuf,
    /// The repository on the hub, `org/name`. The token comes from HF_TOKEN or the token file.
    #[arg(value_name = "ORG/NAME")]
    pub repo: String,
    /// Make the repository, and the branch, if there is none.
    #[arg(long)]
    pub create: bool,
    /// Only into a private repository; one that is made is private.
    #[arg(long)]
    pub private: bool,
    /// The branch to commit to, `main` by default.
    #[arg(long, value_name = "BRANCH")]
    pub revision: Option<String>,
    /// The commit's message.
    #[arg(long, value_name = "M")]
    pub message: Option<String>,
    /// For an adapter: the base that the uploaded adapter_config.json names, in place of the one in the folder.
    #[arg(long, value_name = "ORG/NAME")]
    pub base_model: Option<String>,
    /// Check everything and list what would be sent, without any connection.
    #[arg(long)]
    pub dry_run: bool,
    /// Make no network connection at all.
    #[arg(long)]
    pub offline: bool,
    /// Print one JSON object.
    #[arg(long)]
    pub json: bool,
}

/// `peft inspect`.
#[derive(Args)]
pub struct InspectArgs {
    /// A checkpoint or adapter folder, a hub id, a safetensors file or a data file.
    pub path: String,
    /// For a data file: the checkpoint whose tokenizer and template are used.
    #[arg(long, value_name = "B")]
    pub base_model: Option<String>,
    #[command(flatten)]
    pub format: DataArgs,
    /// For a data file: how many examples to show.
    #[arg(long, value_name = "N", default_value_t = 3)]
    pub examples: usize,
    /// Make no network connection at all.
    #[arg(long)]
    pub offline: bool,
    /// Print one JSON object.
    #[arg(long)]
    pub json: bool,
}

/// `peft report`.
#[derive(Args)]
pub struct ReportArgs {
    /// The run's output folder.
    pub dir: PathBuf,
}
