"""Fill a prompt and get an answer with LangChain."""

import os

from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI

prompt = ChatPromptTemplate.from_messages([("user", "What is the capital of {country}?")])
model = ChatOpenAI(model=os.environ["MODEL"], max_completion_tokens=50)  # reads OPENAI_BASE_URL and OPENAI_API_KEY
answer = (prompt | model).invoke({"country": "France"})
print(answer.text)
print(f"{answer.usage_metadata['output_tokens']} tokens")
