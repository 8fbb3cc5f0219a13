//! Tenants who do not trust each other: whatever one of them sends, the others' connections go on.

mod hostile;
